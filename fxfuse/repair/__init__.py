"""Mending ONNX files that were exported by others: their operators are fused already, but in a form that does not
run."""

from fxfuse.repair.file import Repaired, repair

__all__ = ["Repaired", "repair"]
