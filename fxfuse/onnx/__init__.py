"""From a model to ONNX: `export`, which is called like ``torch.onnx.export``; or `install` and `enabled`, which make
``torch.onnx.export`` itself fuse.
"""

from fxfuse.files import save
from fxfuse.onnx.capturing.capture import capture
from fxfuse.onnx.exporter import export
from fxfuse.onnx.plugin import enabled, install, uninstall
from fxfuse.ops import translation_table

__all__ = ["capture", "enabled", "export", "install", "save", "translation_table", "uninstall"]
