"""A static cache: new keys are written into buffers of T slots by TensorScatter, where a growing cache became longer.

    past_key_values.N.key   [B, H, P, D]       becomes    [B, H, T, D], of which P slots are filled
    present.N.key           [B, H, P + S, D]              the same buffer after the write: input and output may share it

Whatever read all keys so far reads a slice of the buffer now, of P + S slots, so that the masks, windows and padding of
the growing graph stay as they are. P was the length of the past; here it is the length of attention_mask less that of
input_ids:

    past buffer ─┐                       ┌─ present
    new k ───────┴─ TensorScatter at P ──┴─ Slice(0 : P + S) ── Attention(q, k, v, mask)

Source: https://onnx.ai/onnx/operators/onnx__TensorScatter.html. The slice is what makes it fast on a CPU: ONNX
Runtime's CPU kernel of Attention computes with every slot that it is given, used or not. A kernel for GPUs need not,
and copying the slice would cost more: with profile="cuda" Attention reads the whole buffer, is told by
`nonpad_kv_seqlen` that P + S slots are filled, and the mask is padded to T columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import onnx_ir as ir

from fxfuse.decoder.description import describe
from fxfuse.decoder.names import Place, pasts_of
from fxfuse.errors import FxfuseError
from fxfuse.onnx.pieces import TypedTape, constant, heads_apart, heads_together

SLOTS = "max_length"
"""The name of the buffers' length T, a dimension that whoever runs the graph chooses."""
Profile = Literal["cpu", "cuda"]


def make_static(model: ir.Model, profile: Profile = "cpu") -> None:
    """Rewrites a decoder with the inputs and outputs of `fxfuse.decoder.export`, in place.

    Args:
        profile: "cpu" slices the filled slots out of the buffers before they are read, "cuda" reads whole buffers.

    Raises:
        FxfuseError: the opset is below 24, which brought TensorScatter, or something else is done with the cache than
            to join new keys to it. The model may be half rewritten then, and is of no use.
    """
    check_opset(model)
    pasts = pasts_of(model)
    lengths = Lengths(model.graph, pasts[0][1] if profile == "cuda" else None)
    for place, past in pasts:
        Buffer(place, past, lengths).rewrite()
    describe(model, "static")


def check_opset(model: ir.Model) -> None:
    """Raises FxfuseError if the model is of an opset that has no TensorScatter."""
    if model.opset_imports[""] < 24:
        raise FxfuseError(
            "a static cache is written by TensorScatter, which there is from opset 24 on",
            where="cache",
            hint="opset=24",
        )


class Lengths:
    """What all buffers share, computed once at the top of the graph, in int64.

    Args:
        whole: one of the buffers, if attention is to read them whole; None if it reads slices.

    Attributes:
        past, total: P and P + S, each [1].
        start: the slot at which each row of the batch is written, [B].
        filled: for whole buffers, how many slots of each row are filled after that, [B].
        padding: for whole buffers, how many columns a mask [.., P + S] lacks before and after it, [2].
        masks: for whole buffers, by mask, the one that was padded to T columns.

    Raises:
        FxfuseError: the graph has no input_ids or attention_mask, from whose lengths all this is computed.
    """

    def __init__(self, graph: ir.Graph, whole: ir.Value | None) -> None:
        self.graph, self.whole = graph, whole is not None
        inputs = {value.name: value for value in graph.inputs}
        for name in ("input_ids", "attention_mask"):
            if name not in inputs:
                raise FxfuseError(f"the graph has no {name}, whose length says where to write", where="cache")
        self._tape = TypedTape()
        add = self._tape.add
        new = add("Shape", [inputs["input_ids"]], {"start": 1, "end": 2})
        self.total = add("Shape", [inputs["attention_mask"]], {"start": 1, "end": 2})
        self.past = add("Sub", [self.total, new])
        rows = add("Shape", [inputs["input_ids"]], {"start": 0, "end": 1})
        self.start = add("Expand", [self.past, rows])
        self.zero, self.two = (constant(graph, [number]) for number in (0, 2))
        if whole is not None:
            self.filled = add("Expand", [self.total, rows])
            slots = add("Shape", [whole], {"start": 2, "end": 3})
            free = add("Sub", [slots, self.total])
            self.padding = add("Concat", [self.zero, free], {"axis": 0})
        self.masks: dict[ir.Value, ir.Value] = {}
        graph.insert_before(next(iter(graph)), self._tape.nodes)

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """What was put at the top of the graph."""
        return self._tape.nodes

    def append(
        self,
        op: str,
        inputs: Sequence[ir.Value],
        attributes: dict[str, Any] | None = None,
        kind: ir.DataType = ir.DataType.INT64,
    ) -> ir.Value:
        """One more value at the top of the graph, behind those that were put there before."""
        last = self.nodes[-1]
        value = self._tape.add(op, inputs, attributes, dtype=kind)
        self.graph.insert_after(last, self.nodes[-1])
        return value


class Buffer:
    """One input of the cache, the keys or values of a layer: whatever reads it is made to read a buffer of T slots."""

    def __init__(self, place: Place, past: ir.Value, lengths: Lengths) -> None:
        self.past, self.lengths, self.graph = past, lengths, lengths.graph
        assert past.shape is not None
        self.batch, self.heads, _, self.size = past.shape
        self.present = place.present
        past.shape = ir.Shape([self.batch, self.heads, SLOTS, self.size])

    def rewrite(self) -> None:
        """Rewrites every node that reads the input.

        Raises:
            FxfuseError: one of them does something else than to join new keys, or none of them does that.
        """
        written = False
        for use in list(self.past.uses()):
            if use.node in self.lengths.nodes:
                continue
            if use.node.op_type == "Shape":
                self._length(use.node)
            elif use.node.op_type == "Attention" and use.idx in (4, 5):
                written |= self._attention(use.node, use.idx)
            elif use.node.op_type == "Concat" and use.idx == 0 and len(use.node.inputs) == 2:
                new = use.node.inputs[1]
                assert new is not None
                self.replace(use.node, use.node.outputs[0], new)
                self.graph.remove(use.node, safe=True)
                written = True
            else:
                raise self.refused(f"{use.node.op_type} reads it")
        if not written:
            raise self.refused("nothing is joined to it")

    def _length(self, node: ir.Node) -> None:
        """Where the graph asks for the past's shape it is given what it was: P in the place of T."""
        start, end = (node.attributes[n].as_int() if n in node.attributes else d for n, d in (("start", 0), ("end", 4)))
        sizes = []
        for axis in range(start % 4, min(end if end >= 0 else end + 4, 4)):
            if axis == 2:
                sizes.append(self.lengths.past)
            else:
                sizes.append(self.insert(node, "Shape", [self.past], {"start": axis, "end": axis + 1}))
        whole = sizes[0] if len(sizes) == 1 else self.insert(node, "Concat", sizes, {"axis": 0})
        node.outputs[0].replace_all_uses_with(whole)
        self.graph.remove(node, safe=True)

    def _attention(self, node: ir.Node, place: int) -> bool:
        """Makes an Attention take keys (input 4) or values (input 5) from the buffer and not from its past; returns
        True.

        Once it has been done for both, the node is made anew without a past.
        """
        new = node.inputs[place - 3]
        assert new is not None
        flat = new.shape is not None and len(new.shape) == 3
        heads = self._heads(node, new, "kv_num_heads") if flat else new
        outputs = node.outputs
        if len(outputs) <= place - 3 or not outputs[place - 3].is_graph_output():
            raise self.refused("an Attention reads it and does not give the present")
        used = self.replace(node, outputs[place - 3], heads)
        node.replace_input_with(place - 3, used)
        node.replace_input_with(place, None)
        if all(len(node.inputs) <= i or node.inputs[i] is None for i in (4, 5)):
            self.without_past(node, flat)
        return True

    def without_past(self, node: ir.Node, flat: bool) -> None:
        """Makes the node anew: without a past it gives one output, and q has four dimensions as the keys have.

        Args:
            flat: whether q came as [B, S, H·D].
        """
        if node.attributes.get_int("is_causal", 0):
            raise self.refused("an Attention is causal by its attribute, which counts from the end of the past")
        q, old = node.inputs[0], node.outputs[0]
        assert q is not None
        attributes = {n: a for n, a in node.attributes.items() if n not in ("q_num_heads", "kv_num_heads")}
        q = self._heads(node, q, "q_num_heads") if flat else q
        inputs = [q, *node.inputs[1:4]]
        if self.lengths.whole:
            if any(value is None or not _is_written(value) for value in inputs[1:3]):
                raise self.refused("other nodes read the keys and values so far, which profile='cuda' does not make")
            mask = inputs[3] if len(inputs) == 4 else None
            inputs = [*inputs[:3], mask if mask is None else self._full(node, mask), None, None, self.lengths.filled]
        result = self.insert(node, "Attention", inputs, attributes)
        result.type = old.type
        if flat:
            result = heads_together(self.graph, partial(self.insert, node), result)
        result.type, result.shape, result.name = old.type, old.shape, old.name
        old.name = None
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def _full(self, node: ir.Node, mask: ir.Value) -> ir.Value:
        """The mask, padded to the end of the buffer; layers that share a mask share the padded one, too."""
        if mask not in self.lengths.masks:
            last = constant(self.graph, [-1])
            pads = [mask, self.lengths.padding, None, last]
            self.lengths.masks[mask] = self.insert(node, "Pad", pads, {"mode": "constant"})
        return self.lengths.masks[mask]

    def _heads(self, node: ir.Node, value: ir.Value, attribute: str) -> ir.Value:
        """[B, S, H·D] as [B, H, S, D]."""
        return heads_apart(self.graph, partial(self.insert, node), value, node.attributes[attribute].as_int())

    def replace(self, node: ir.Node, grown: ir.Value, new: ir.Value) -> ir.Value:
        """Writes `new` [B, H, S, D] into the buffer, before `node`. What read the `grown` keys [B, H, P + S, D] reads a
        slice of the buffer; returns what `node` is to read: that slice, or the whole buffer."""
        attributes = {"axis": 2, "mode": "linear"}
        buffer = self.insert(node, "TensorScatter", [self.past, new, self.lengths.start], attributes)
        buffer.shape, buffer.type = self.past.shape, self.past.type
        reads_whole = self.lengths.whole and node.op_type == "Attention" and not grown.uses()
        used = buffer
        if not reads_whole:
            used = self.insert(node, "Slice", [buffer, self.lengths.zero, self.lengths.total, self.lengths.two])
            used.shape, used.type = grown.shape, self.past.type
        self.give(grown, buffer)
        grown.replace_all_uses_with(used)
        return used

    def give(self, grown: ir.Value, buffer: ir.Value) -> None:
        """Makes the graph give the buffer back, under the same name, where it gave the `grown` keys."""
        if grown.name != self.present:
            raise self.refused(f"what is joined to it is {grown.name}, not {self.present}")
        grown.name = None
        outputs = self.graph.outputs
        outputs[[output is grown for output in outputs].index(True)] = buffer
        buffer.name = self.present

    def insert(self, before: ir.Node, op: str, inputs: Sequence[Any], attributes: Any = None) -> ir.Value:
        node = ir.node(op, inputs, attributes)
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64) if op == "Shape" else inputs[0].type
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def refused(self, why: str) -> FxfuseError:
        return FxfuseError(
            f"{self.past.name} cannot become a buffer: {why}", where="cache", hint='cache="growing" leaves it as it is'
        )


def _is_written(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "TensorScatter"
