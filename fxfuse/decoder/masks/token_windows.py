"""Sliding windows that count tokens and not columns, so that padding between the tokens of a row takes no room in them.

A model's mask hides keys that lie W columns back. A runtime that pads rows on the right, and goes on behind the
padding, leaves columns in between that are no tokens; so a row in a batch would see fewer tokens than it sees alone. If
columns are compared by the number of tokens up to them,

    near[b, s, t] = n[b, t] > n[b, P + s] - W        n = CumSum(attention_mask)  [B, P + S]
    seen          = near and attention_mask[b, t] and t <= P + s

a row sees what it sees without padding. Where nothing is padded, or only the left, both ways are the same. Which masks
are of such windows, and that they hide nothing else, is decided for every length (`fxfuse.decoder.masks.decided`).
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fxfuse.decoder.forms.ragged import of_masks
from fxfuse.decoder.forms.static import Lengths
from fxfuse.decoder.masks.decided import Masks
from fxfuse.onnx.pieces import constant, initializer
from fxfuse.proof.positions.terms import Unreadable


def with_token_windows(model: ir.Model) -> ir.Model:
    """The decoder with windows that count tokens: a copy that shares the weights, or `model` itself if it has no
    windows."""
    if not _windows(model.graph):
        return model
    result = model.clone()
    windows = _windows(result.graph)
    tokens = _Tokens(result.graph)
    for mask, (size, lowest) in windows.items():
        mask.replace_all_uses_with(tokens.mask(mask, size, lowest))
    RemoveUnusedNodesPass()(result)
    return result


def _windows(graph: ir.Graph) -> dict[ir.Value, tuple[int, float]]:
    """The masks of attentions that are of sliding windows, each with W and with the number that hides a key, −inf for a
    mask of booleans."""
    found: dict[ir.Value, tuple[int, float]] = {}
    try:
        whole, padded = (Masks(graph, padded=padded) for padded in (False, True))
    except Unreadable:
        return found
    seen: set[ir.Value] = set()
    for node in graph:
        mask = node.inputs[3] if node.op_type == "Attention" and len(node.inputs) > 3 else None
        above = None if mask is None else mask.producer()
        if above is not None and above.op_type == "Pad":  # up to the end of static buffers
            mask = above.inputs[0]
        if mask is None or mask in seen or not of_masks(mask) or mask.shape is None or len(mask.shape) != 4:
            continue
        seen.add(mask)
        if (size := whole.reach(mask)) and (lowest := padded.hidden_by_window(mask, size)) is not None:
            found[mask] = size, lowest
    return found


class _Tokens:
    """What the new masks share, computed once at the top of the graph: the number of tokens up to each key and query,
    and which keys are no padding and not after the query."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph, self.lengths = graph, Lengths(graph, None)
        add, lengths = self.lengths.append, self.lengths
        given = next(value for value in graph.inputs if value.name == "attention_mask")
        zero, one, two = (constant(graph, [number]) for number in (0, 1, 2))
        count = add("CumSum", [given, one])
        self.keys = add("Unsqueeze", [count, one])
        self.queries = add("Unsqueeze", [add("Slice", [count, lengths.past, lengths.total, one]), two])
        first, past, total, step = (add("Squeeze", [n, zero]) for n in (zero, lengths.past, lengths.total, one))
        rows = add("Unsqueeze", [add("Range", [past, total, step]), one])
        before = add("LessOrEqual", [add("Range", [first, total, step]), rows], kind=ir.DataType.BOOL)
        kept = add("Cast", [given], {"to": ir.DataType.BOOL}, ir.DataType.BOOL)
        kept = add("Unsqueeze", [kept, one], kind=ir.DataType.BOOL)
        self.kept = add("And", [before, kept], kind=ir.DataType.BOOL)

    def mask(self, old: ir.Value, size: int, lowest: float) -> ir.Value:
        """The new mask [B, 1, S, P + S] in the place of `old`, of its type."""
        add, one = self.lengths.append, constant(self.graph, [1])
        last = add("Sub", [self.queries, constant(self.graph, [size])])
        near = add("Greater", [self.keys, last], kind=ir.DataType.BOOL)
        seen = add("And", [self.kept, near], kind=ir.DataType.BOOL)
        mask = add("Unsqueeze", [seen, one], kind=ir.DataType.BOOL)
        assert old.dtype is not None
        if old.dtype != ir.DataType.BOOL:
            numbers = (self._number(number, old.dtype) for number in (0.0, lowest))
            mask = add("Where", [mask, *numbers], kind=old.dtype)
        mask.shape = old.shape
        return mask

    def _number(self, number: float, kind: ir.DataType) -> ir.Value:
        name = f"fxfuse.{'zero' if number == 0 else 'hidden'}_{kind.name.lower()}"
        return initializer(self.graph, name, ir.tensor([number], dtype=kind))
