"""A streaming cache in a graph for any number of tokens a call.

    places of keys     p of a sink, else p - shift; shift = max(0, P + 1 - C), which is right for the first new token
    scores             q at p - shift with all others, q at min(p, C - 1) with sinks: two halves of a head of 2 D

    past ─┐            ┌─ RotaryEmbedding at places ─ Where(sink): [k, 0] or [0, k] ─ Attention(q, k, v, mask)
    new k ┴─ Concat ───┤
                       └─ GatherND: what stands in each slot after them ── present

Each of the S tokens sees other keys, and ranks them among what it sees itself. From one token to the next all places
move by one shift, which query and keys have in common and which a rotation therefore does not show; only the places of
the sinks stay. So the keys are rotated once for all S tokens, and the queries twice: once for the sinks and once for
the rest. A head is given both halves side by side, and each key has zeros in the half that is not meant for it. A
prompt of any length, whole or in chunks, so gives what its tokens would give one by one. Where cos and sin come from a
table, it must have C + S - 1 rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from fxfuse.decoder.forms.streaming.layer import StreamingCache, Turned, refused
from fxfuse.decoder.forms.streaming.rotation import rotation_table
from fxfuse.onnx.pieces import constant, counted, initializer


class AnyTokensCache(StreamingCache):
    """Which keys each token sees, at which places, and which of cache and new tokens stands in each slot afterwards."""

    def __init__(self, graph: ir.Graph, sinks: int, window: int) -> None:
        super().__init__(graph, sinks, window)
        add, flag = self.add, ir.DataType.BOOL
        C, W, S0, zero, one, two, end = (
            constant(graph, [n]) for n in (sinks + window, window, sinks, 0, 1, 2, self.size - 1)
        )
        past = add("Slice", [self.new, zero, one, one])
        newest = add("Sub", [past, one])
        last = add("Add", [newest, add("Shape", [self.new], {"start": 1, "end": 2})])
        slots = counted(graph, self.size)
        fixed = add("Less", [slots, S0], kind=flag)

        def stored(until: ir.Value) -> ir.Value:
            """The position in each slot [B, C], once `until` [B, 1] is written."""
            turned = add("Sub", [until, add("Mod", [add("Sub", [until, slots]), W])])
            return add("Where", [fixed, slots, turned])

        positions = add("Concat", [stored(newest), self.new], {"axis": 1})
        there = add("LessOrEqual", [slots, newest], kind=flag)
        fresh = add("GreaterOrEqual", [self.new, zero], kind=flag)
        filled = add("Concat", [there, fresh], {"axis": 1}, kind=flag)
        sink = add("Less", [positions, S0], kind=flag)
        keys, queries = add("Unsqueeze", [positions, one]), add("Unsqueeze", [self.new, two])
        recent = add("Greater", [keys, add("Sub", [queries, W])], kind=flag)
        kept = add("Or", [recent, add("Unsqueeze", [sink, one], kind=flag)], kind=flag)
        seen = add("And", [kept, add("LessOrEqual", [keys, queries], kind=flag)], kind=flag)
        seen = add("And", [seen, add("Unsqueeze", [filled, one], kind=flag)], kind=flag)
        self.mask = add("Unsqueeze", [seen, one], kind=flag)
        self.sink = add("Unsqueeze", [sink, constant(graph, [1, 3])], kind=flag)

        shift = add("Max", [add("Sub", [past, end]), zero])
        self.places = add("Max", [add("Where", [sink, positions, add("Sub", [positions, shift])]), zero])
        self.recent_places = add("Sub", [self.new, shift])
        self.sink_places = add("Min", [self.new, end])

        after, used = stored(last), add("LessOrEqual", [slots, last], kind=flag)
        written = add("And", [used, add("GreaterOrEqual", [after, past], kind=flag)], kind=flag)
        source = add("Where", [written, add("Add", [add("Sub", [after, past]), C]), slots])
        self.source = add("Unsqueeze", [source, constant(graph, [1, 3])])
        self.copies: dict[tuple[ir.Value, ir.Value], ir.Value] = {}
        self.proved: set[tuple[ir.Value, ir.Value]] = set()

    def write(self, past: ir.Value, new: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Cache and new tokens side by side [B, H, C + S, D], and what is kept of them [B, H, C, D]."""
        add = self.add
        heads = past.shape and past.shape[1]
        assert isinstance(heads, int)
        both = add("Concat", [past, new], {"axis": 2}, past.dtype)
        index = add("Expand", [self.source, constant(self.graph, [1, heads, 1, 1])])
        return both, add("GatherND", [both, index], {"batch_dims": 2}, past.dtype)

    def attend(
        self, queries: Turned, keys: Turned, values: ir.Value, attributes: Mapping[str, ir.Attr], kind: ir.DataType
    ) -> ir.Value:
        add = self.add
        rotated = self._rotate(keys, self.places)
        none = initializer(self.graph, f"fxfuse.none_{kind.name.lower()}", ir.tensor(np.zeros((), kind.numpy())))
        apart = [add("Where", [self.sink, *pair], kind=kind) for pair in ((none, rotated), (rotated, none))]
        both = [self._rotate(queries, places) for places in (self.recent_places, self.sink_places)]
        q, k = (add("Concat", halves, {"axis": -1}, kind) for halves in (both, apart))
        return add("Attention", [q, k, values, self.mask], attributes, kind)

    def _rotate(self, turned: Turned, places: ir.Value) -> ir.Value:
        inputs = [turned.value, *self._tables(turned, places)]
        return self.add("RotaryEmbedding", inputs, turned.attributes, turned.value.dtype)

    def _tables(self, turned: Turned, places: ir.Value) -> list[ir.Value]:
        """cos and sin of a RotaryEmbedding at `places`, where the graph has them at position_ids.

        Raises:
            FxfuseError: the rotation tells more than distances.
        """
        found = [self._copy(value, places) for value in turned.tables]
        if turned.tables not in self.proved and places is self.places:
            table = rotation_table(self.graph, [places], found, self.size)
            if isinstance(table, str):
                raise refused(f"the rotation {turned.rotary.name} tells more than distances: {table}")
            self.proved.add(turned.tables)
        return found

    def _copy(self, value: ir.Value, places: ir.Value) -> ir.Value:
        """The same value, computed from `places` where the graph computes it from position_ids: what is on the way is
        copied, and shared between all rotations at these places."""
        if value is self.new:
            return places
        if (value, places) in self.copies:
            return self.copies[value, places]
        node = value.producer()
        if node is None:
            if value.is_graph_input():
                raise refused(f"{value.name} has a part in a rotation")
            return value
        if node.op_type == "Shape" and node.inputs[0] is self.inputs.get("input_ids"):
            inputs: list[ir.Value | None] = [places]
        else:
            inputs = [i if i is None else self._copy(i, places) for i in node.inputs]
        if all(new is old for new, old in zip(inputs, node.inputs, strict=True)):
            copies: Sequence[ir.Value] = node.outputs
        else:
            attributes = list(node.attributes.values())
            copy = ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=len(node.outputs))
            for new, old in zip(copy.outputs, node.outputs, strict=True):
                new.type = old.type
            self.graph.insert_before(self.before, copy)
            copies = copy.outputs
        self.copies.update({(old, places): new for old, new in zip(node.outputs, copies, strict=True)})
        return self.copies[value, places]
