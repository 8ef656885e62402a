"""What an element of a tensor is in an ONNX graph, read operator by operator."""
