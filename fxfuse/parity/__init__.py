"""Do two implementations compute the same thing? Eager, fused, and ONNX Runtime, at several shapes."""

from fxfuse.parity.compare import Result, compare
from fxfuse.parity.ort import (
    OnnxRuntime,
    check_onnx,
    float32_twin,
    onnxruntime_outputs,
    open_session,
    require_onnxruntime,
)
from fxfuse.parity.shapes import ShapeCase, shape_cases
from fxfuse.parity.wide import wide_outputs, working_dtype

__all__ = [
    "OnnxRuntime",
    "Result",
    "ShapeCase",
    "check_onnx",
    "compare",
    "float32_twin",
    "onnxruntime_outputs",
    "open_session",
    "require_onnxruntime",
    "shape_cases",
    "wide_outputs",
    "working_dtype",
]
