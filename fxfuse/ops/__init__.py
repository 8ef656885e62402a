"""The fused operators: `torch.ops.fxfuse.*`, one file per ONNX operator.

Importing this package registers them. `OPS` lists them; `translation_table` and `decompositions` are the two ways
out of a graph that holds them, to ONNX and back to ATen.
"""

from __future__ import annotations

from fxfuse.kernels import dispatch
from fxfuse.ops import (
    attention,
    dequantize_linear,
    flex_attention,
    quantize_linear,
    rms_norm,
    rotary_embedding,
    tensor_scatter,
)
from fxfuse.ops.registry import OPS, OnnxOp, decompositions, holds_fused, translation_table

__all__ = [
    "OPS",
    "OnnxOp",
    "attention",
    "decompositions",
    "dequantize_linear",
    "flex_attention",
    "holds_fused",
    "quantize_linear",
    "rms_norm",
    "rotary_embedding",
    "tensor_scatter",
    "translation_table",
]

dispatch.register()
