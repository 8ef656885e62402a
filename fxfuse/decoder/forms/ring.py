"""Sliding windows: layers that look back W positions get a cache of W slots, which is written round and round.

    past_key_values.N.key   [B, H, P, D]       becomes    [B, H, W, D]; position p stands in slot p mod W
    present.N.key           [B, H, P + S, D]              the same ring after the write: input and output may share it

    ring ─┐                                  ┌─ Attention(q, k, v, mask)
    new k ┴─ Concat [B, H, W + S, D] ────────┤
                                             └─ Slice: the last W of the new ── TensorScatter, circular ── present

The growing graph has a mask with a column for every position; here each slot takes the column of the position whose
key it holds. In slot j that is position P - 1 - (P - 1 - j) mod W; where this is negative the slot is still empty. All
new keys are attended to before the ring is written, so that a prompt may be longer than the ring. What is written is a
slice of the Concat, which has read the ring by then: a runtime that lets input and output share their memory cannot
write it first.

In a graph for one token, the key that is overwritten is the one that has just left the window of the query. So the ring
can be written first, and read as it lies:

    ring ──┐                                              ┌─ present
    new k ─┴─ TensorScatter, circular, at P mod W ────────┴─ Attention(q, k, v, mask)

Layers without a window are static (`fxfuse.decoder.forms.static`).

Source: mode circular of https://onnx.ai/onnx/operators/onnx__TensorScatter.html
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from fxfuse.decoder.description import describe
from fxfuse.decoder.forms.static import Buffer, Lengths, check_opset
from fxfuse.decoder.names import Place, pasts_of
from fxfuse.errors import FxfuseError
from fxfuse.onnx.pieces import constant, counted, initializer, takes_one_token


def make_rings(model: ir.Model, windows: Mapping[int, int]) -> None:
    """Rewrites a decoder with the inputs and outputs of `fxfuse.decoder.export`, in place.

    Args:
        windows: by layer, how many positions a query sees, its own included (W); layers that are not named see all.

    Raises:
        FxfuseError: the opset is below 24, or something else than an Attention with a mask reads a windowed layer's
            cache. The model may be half rewritten then, and is of no use.
    """
    check_opset(model)
    lengths = Lengths(model.graph, None)
    one_token = takes_one_token(model.graph)
    rings = {size: _RingPositions(lengths, size, one_token) for size in set(windows.values())}
    for place, past in pasts_of(model):
        size = windows.get(place.layer)
        (Buffer(place, past, lengths) if size is None else _Ring(place, past, lengths, rings[size])).rewrite()
    describe(model, "sliding", rings=windows)


class _RingPositions:
    """What all rings of one size W share: which position each column of the mask stands for, which slots hold a key,
    and at which slot new keys are written. All of it is computed once, at the top of the graph."""

    def __init__(self, lengths: Lengths, size: int, one_token: bool) -> None:
        self.size, self.lengths, self.one_token = size, lengths, one_token
        graph = lengths.graph
        add = lengths.append
        W, one, scalar = constant(graph, [size]), constant(graph, [1]), constant(graph, [0])
        newest = lengths.past if one_token else add("Sub", [lengths.past, one])
        slots = counted(graph, size)
        positions = add("Sub", [newest, add("Mod", [add("Sub", [newest, slots]), W])])
        first = lengths.past
        if not one_token:
            new = add("Sub", [lengths.total, lengths.past])
            ends = [add("Squeeze", [value, scalar]) for value in (lengths.past, lengths.total, one)]
            positions = add("Concat", [positions, add("Range", ends)], {"axis": 0})
            skipped = add("Max", [add("Sub", [new, W]), lengths.zero])
            self.begin, self.end = add("Add", [skipped, W]), add("Add", [new, W])
            first = add("Add", [lengths.past, skipped])
        self.columns = add("Max", [positions, lengths.zero])
        self.filled = add("GreaterOrEqual", [positions, lengths.zero], kind=ir.DataType.BOOL)
        first = add("Mod", [first, W])
        self.start = add("Expand", [first, add("Shape", [lengths.start])])
        self.masks: dict[ir.Value, ir.Value] = {}


class _Ring(Buffer):
    """One input of the cache, keys or values, in as many slots as its layer looks back."""

    def __init__(self, place: Place, past: ir.Value, lengths: Lengths, slots: _RingPositions) -> None:
        super().__init__(place, past, lengths)
        self.slots = slots
        past.shape = ir.Shape([self.batch, self.heads, slots.size, self.size])

    def replace(self, node: ir.Node, grown: ir.Value, new: ir.Value) -> ir.Value:
        """Writes `new` [B, H, S, D] into the ring, and gives what is attended to: what the ring held, and all of `new`
        ([B, H, W + S, D]); in a graph for one token the ring itself, which has the new key already."""
        if node.op_type != "Attention" or grown.uses():
            raise self.refused("other nodes read all the keys and values so far")
        seen, slots = new, self.slots
        if not slots.one_token:
            seen = self.insert(node, "Concat", [self.past, new], {"axis": 2})
            new = self.insert(node, "Slice", [seen, slots.begin, slots.end, self.lengths.two])
        ring = self.insert(node, "TensorScatter", [self.past, new, slots.start], {"axis": 2, "mode": "circular"})
        ring.shape, ring.type = self.past.shape, self.past.type
        self.give(grown, ring)
        return ring if slots.one_token else seen

    def without_past(self, node: ir.Node, flat: bool) -> None:
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask is None:
            raise self.refused("an Attention without a mask reads it, which has no window")
        if mask not in self.slots.masks:
            self.slots.masks[mask] = self._of_slots(node, mask)
        node.replace_input_with(3, self.slots.masks[mask])
        super().without_past(node, flat)

    def _of_slots(self, node: ir.Node, mask: ir.Value) -> ir.Value:
        """The mask [.., P + S], a column a position, as one [.., W + S] with a column a slot and a new key; in a graph
        for one token [.., W], a column a slot."""
        columns = self.insert(node, "Gather", [mask, self.slots.columns], {"axis": -1})
        if mask.dtype == ir.DataType.BOOL:
            return self.insert(node, "And", [columns, self.slots.filled])
        if mask.dtype is None:
            raise self.refused("the type of a mask is not known")
        lowest = _lowest(self.graph, mask.dtype)
        hidden = self.insert(node, "Where", [self.slots.filled, columns, lowest])
        hidden.type = mask.type
        return hidden


def _lowest(graph: ir.Graph, kind: ir.DataType) -> ir.Value:
    """The lowest finite number of a type, [1]. Added to a score it hides the key; unlike -inf it gives no NaN in a row
    that hides all of its keys."""
    if kind == ir.DataType.BFLOAT16:
        raise FxfuseError(
            "a sliding cache is written in float32 and float16, not in bfloat16",
            where="cache",
            hint="export the model in float32 or float16",
        )
    number = np.array([np.finfo(kind.numpy()).min], kind.numpy())
    return initializer(graph, f"fxfuse.lowest_{kind.name.lower()}", ir.tensor(number))
