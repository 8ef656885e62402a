"""Counting the fused operators of an ONNX graph, and looking for what should not be before them."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

_MOVES = {"Reshape", "Transpose", "Cast", "Identity", "Unsqueeze", "Squeeze"}


def counts(model: ir.Model) -> tuple[int, int, int]:
    """RMSNormalization, RotaryEmbedding and Attention nodes."""
    found = Counter(n.op_type for n in model.graph.all_nodes() if n.domain == "")
    return found["RMSNormalization"], found["RotaryEmbedding"], found["Attention"]


def expanded_keys(model: ir.Model) -> list[str]:
    """Attention nodes whose k or v has its heads repeated before it."""
    found = []
    for node in model.graph.all_nodes():
        if node.op_type == "Attention":
            found.extend(str(node.name) for value in node.inputs[1:3] if _repeated(value))
    return found


def _repeated(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _MOVES:
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    return node is not None and node.op_type in ("Expand", "Tile")
