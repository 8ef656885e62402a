"""Complex tensors as two real ones: ONNX has no complex type."""
