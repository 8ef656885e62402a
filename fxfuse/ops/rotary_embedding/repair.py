"""RotaryEmbedding whose cos, sin or position_ids have batch 1 where x has more.

onnxscript's fusion (torch.onnx at opset 23) leaves cos and sin as the model computed them, [1, S, D/2]. ONNX's operator
takes [B, S, D/2], and does not broadcast: ONNX Runtime runs such a file at batch 1, and fails at 2.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase


class BatchOfOne(RewriteRuleClassBase):
    """Expand cos and sin [1, S, D/2], or position_ids [1, S], to the batch of x."""

    what = "RotaryEmbedding: cos, sin or position_ids of batch 1 expanded to the batch of x"

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any) -> Any:
        return op.RotaryEmbedding(x, cos, sin, _allow_other_inputs=True, _outputs=["y"])

    def check(self, context: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, **_: Any) -> MatchResult:  # type: ignore[override]
        result = MatchResult()
        broadcast = not _single(x) and any(map(_single, self._per_batch(context.root)))
        return result if broadcast else result.fail("every sequence has its own cos and sin")

    def rewrite(self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, y: ir.Value) -> ir.Value:
        node = y.producer()
        assert node is not None
        batch = _batch(op, x)
        inputs = list(node.inputs)
        for value in self._per_batch(node):
            if _single(value):
                assert value.shape is not None
                ones = op.Constant(value_ints=[1] * (len(value.shape) - 1))
                expanded = op.Expand(value, op.Concat(batch, ones, axis=0))
                inputs = [expanded if i is value else i for i in inputs]
        result: ir.Value = op.RotaryEmbedding(*inputs, **node.attributes)
        return result

    def _per_batch(self, node: ir.Node) -> list[ir.Value]:
        """The inputs of the node that need a row for every sequence of the batch."""
        _, cos, sin, *positions = node.inputs
        found = positions[:1] if positions and positions[0] is not None else [cos, sin]
        return [value for value in found if value is not None]


def _single(value: ir.Value) -> bool:
    """Is it known to be of batch 1?"""
    return value.shape is not None and len(value.shape) > 0 and value.shape[0] == 1


def _batch(op: Any, x: ir.Value) -> Any:
    """The batch size of x as a tensor [1]. It is read from an input of the graph if one has that dimension, so that all
    layers share one node."""
    graph = x.graph
    dim = x.shape[0] if x.shape is not None else None
    if graph is not None and isinstance(dim, ir.SymbolicDim) and dim.value is not None:
        for value in graph.inputs:
            for axis, size in enumerate(value.shape or ()):
                if size == dim:
                    return op.Shape(value, start=axis, end=axis + 1)
    return op.Shape(x, start=0, end=1)


RULES = (BatchOfOne,)
