"""A streaming cache in a graph for one token a row. The new key takes the slot of the one that drops out; nothing else
is moved, for attention does not mind in which order it finds the keys.

    new k ─ TensorScatter into the slot of what drops out ─┬─ RotaryEmbedding at places ─ Attention(q, k, v, filled)
                                                           └─ present

A token at position p sees, itself included, the first min(p + 1, C) slots. Their places are

    of a sink            its position
    of another slot j    min(p, C - 1) - (p - j) mod W
    of the query         min(p, C - 1)

All are below C. So cos and sin are two constants [C, D/2], of which RotaryEmbedding picks rows by its `position_ids`.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from fxfuse.decoder.forms.streaming.layer import StreamingCache, Turned, refused
from fxfuse.decoder.forms.streaming.rotation import rotation_table
from fxfuse.onnx.pieces import constant, counted, initializer


class OneTokenCache(StreamingCache):
    """The slot that is written, how many slots are filled then, and the places of the query and of all slots."""

    def __init__(self, graph: ir.Graph, sinks: int, window: int) -> None:
        super().__init__(graph, sinks, window)
        add, flag = self.add, ir.DataType.BOOL
        C, W, S0, zero, one, end, flat = (
            constant(graph, [n]) for n in (sinks + window, window, sinks, 0, 1, sinks + window - 1, -1)
        )
        position = self.new
        slots = counted(graph, self.size)
        around = add("Add", [add("Mod", [add("Sub", [position, S0]), W]), S0])
        slot = add("Where", [add("Less", [position, S0], kind=flag), position, around])
        self.slot = add("Reshape", [slot, flat])
        self.filled = add("Reshape", [add("Min", [add("Add", [position, one]), C]), flat])
        self.place = add("Min", [position, end])
        # Slots that hold nothing yet have no place; they are not seen.
        recent = add("Sub", [self.place, add("Mod", [add("Sub", [position, slots]), W])])
        fixed = add("Less", [slots, S0], kind=flag)
        self.places = add("Where", [fixed, slots, add("Max", [recent, zero])])
        self.tables: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ...]] = {}

    def write(self, past: ir.Value, new: ir.Value) -> tuple[ir.Value, ir.Value]:
        buffer = self.add("TensorScatter", [past, new, self.slot], {"axis": 2, "mode": "linear"}, past.dtype)
        return buffer, buffer

    def attend(
        self, queries: Turned, keys: Turned, values: ir.Value, attributes: Mapping[str, ir.Attr], kind: ir.DataType
    ) -> ir.Value:
        q, k = self._rotate(queries, self.place), self._rotate(keys, self.places)
        return self.add("Attention", [q, k, values, None, None, None, self.filled], attributes, kind)

    def _rotate(self, turned: Turned, places: ir.Value) -> ir.Value:
        inputs = [turned.value, *self._constants(turned), places]
        return self.add("RotaryEmbedding", inputs, turned.attributes, turned.value.dtype)

    def _constants(self, turned: Turned) -> tuple[ir.Value, ...]:
        """cos and sin [C, D/2] of a RotaryEmbedding at the places 0 to C - 1."""
        if turned.tables not in self.tables:
            given = [self.inputs[name] for name in ("position_ids", "input_ids") if name in self.inputs]
            try:
                found = rotation_table(self.graph, given, turned.tables, self.size)
            except ValueError as error:  # of onnx_ir: the two are made of other inputs as well
                raise refused(f"the rotation {turned.rotary.name} is made of more than positions: {error}") from error
            if isinstance(found, str):
                raise refused(f"the rotation {turned.rotary.name} tells more than distances: {found}")
            count = len(self.tables)
            self.tables[turned.tables] = tuple(
                initializer(self.graph, f"fxfuse.{what}_{count}", ir.tensor(table.copy()))
                for what, table in zip(("cos", "sin"), found, strict=True)
            )
        return self.tables[turned.tables]
