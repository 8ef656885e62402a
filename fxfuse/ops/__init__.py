"""The fused operators: `torch.ops.fxfuse.*`, one folder per ONNX operator.

Importing this package registers them: an operator is known by its folder's being there. `OPS` lists them;
`translation_table` and `decompositions` are the two ways out of a graph that holds them, to ONNX and back to ATen.
"""

from __future__ import annotations

from fxfuse.ops.folders import load
from fxfuse.ops.registry import OPS, OnnxOp, decompositions, holds_fused, translation_table

__all__ = ["OPS", "OnnxOp", "decompositions", "holds_fused", "translation_table"]

load()
