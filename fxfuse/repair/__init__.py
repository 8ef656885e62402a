"""Mending ONNX files that are on disk already: operators that are fused, but in a form that does not run."""

from fxfuse.repair.file import Repaired, repair

__all__ = ["Repaired", "repair"]
