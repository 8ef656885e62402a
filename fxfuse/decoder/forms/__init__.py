"""The forms that a cache can have in a decoder's graph. Capture gives a growing cache; each file here makes another one
of it, by rewriting the ONNX graph."""
