"""From a fused program to an ONNX file that a runtime loads: translations, types, masks, stored integers."""
