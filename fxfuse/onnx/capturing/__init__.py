"""A module and its sample inputs, captured for ONNX as dynamic as they were asked to be."""
