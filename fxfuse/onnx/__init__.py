"""From a model to ONNX: `export`, spelled like ``torch.onnx.export``; or that one itself, made to fuse: `install`."""

from fxfuse.files import save
from fxfuse.onnx.capturing.capture import capture
from fxfuse.onnx.exporter import export
from fxfuse.onnx.plugin import enabled, install, uninstall
from fxfuse.ops import translation_table

__all__ = ["capture", "enabled", "export", "install", "save", "translation_table", "uninstall"]
