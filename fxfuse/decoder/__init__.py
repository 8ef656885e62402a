"""Building a decoder with its cache, as one ONNX graph that prefills and decodes."""
