"""From a model to ONNX: capture, fuse, translate, save. Spelled like ``torch.onnx.export``."""

from fxfuse.onnx.capture import capture
from fxfuse.onnx.exporter import export
from fxfuse.onnx.files import save

__all__ = ["capture", "export", "save"]
