"""StreamingLLM: a decoder that reads without end and keeps the first few tokens, the sinks, and the last W.

    past_key_values.N.key   [B, H, P, D]       becomes    [B, H, C, D], C = sinks + W; keys are not rotated
    present.N.key           [B, H, P + S, D]              the same after the new tokens: input and output may share it

Position p < sinks stands in slot p, p >= sinks in slot sinks + (p - sinks) mod W. A token sees the sinks and the last W
tokens, itself included. All are rotated by their places among what it sees, so that no place is beyond C - 1, however
much was read. That RotaryEmbedding tells distances only, is proved first. So one rotation of the keys serves all S:

    places of keys     p of a sink, else p - shift; shift = max(0, P + 1 - C), which is right for the first new token
    scores             q at p - shift with all others, q at min(p, C - 1) with sinks: two halves of a head of 2 D

    past ─┐            ┌─ RotaryEmbedding at places ─ Where(sink): [k, 0] or [0, k] ─ Attention(q, k, v, mask)
    new k ┴─ Concat ───┤
                       └─ GatherND: what stands in each slot after them ── present

So a prompt of any length, whole or in chunks, gives what its tokens give one by one. position_ids [B, S], consecutive
in each row, say how much was read before: rows may stand at different lengths, and there is no attention_mask. There is
no padding: each row takes S tokens. Where cos and sin come from a table, it must have C + S - 1 places.

Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks, https://arxiv.org/abs/2309.17453, 3.2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fxfuse.errors import FxfuseError
from fxfuse.onnx.ragged_cache import drop_padding, has_past, sees_otherwise
from fxfuse.onnx.relative import not_relative
from fxfuse.onnx.ring_cache import initializer, numbers
from fxfuse.onnx.static_cache import METADATA, constant, pasts_of, present_of


def make_streaming(model: ir.Model, sinks: int, window: int) -> None:
    """Rewrites a decoder with the inputs and outputs of `fxfuse.onnx.decoder`, in place.

    Args:
        sinks: how many of the first tokens are kept, 0 or more.
        window: how many of the last are, 1 or more.

    Raises:
        FxfuseError: a layer whose keys no RotaryEmbedding gives, or one that tells more than distances; that does not
            see all earlier tokens (a window of its own); a graph that reads attention_mask or the cache for something
            else. The model is of no use then.
    """
    graph = model.graph
    pasts = pasts_of(model)
    attentions = [node for node in graph if has_past(node)]
    if (why := sees_otherwise(graph)) is not None:
        raise _refused(why)
    drop_padding(graph)
    slots = _Slots(graph, sinks, window)
    for node in attentions:
        _Layer(node, slots).rewrite()
    RemoveUnusedNodesPass()(model)
    _check_uses(graph, slots.joined, [past for _, past in pasts])
    described = {layer: {"heads": v.shape[1], "head_dim": v.shape[3]} for layer, v in pasts if v.shape is not None}
    about = {
        "form": "streaming",
        "max_length": sinks + window,
        "sinks": sinks,
        "window": window,
        "layers": [described[layer] for layer in sorted(described)],
        "aliases": {present_of(past.name or ""): past.name for _, past in pasts},
    }
    model.metadata_props[METADATA] = json.dumps(about, default=str)


def _check_uses(graph: ir.Graph, joined: Mapping[ir.Value, ir.Value], pasts: Sequence[ir.Value]) -> None:
    """Whatever else read the growing cache or its mask is gone; so is the mask."""
    for past in pasts:
        if past not in joined:
            raise _refused(f"no Attention reads {past.name}")
        for use in past.uses():
            if use.node is not joined[past].producer() and not _is_batch_size(use.node):
                raise _refused(f"{use.node.op_type} reads {past.name} beside the attention")
    for value in [value for value in graph.inputs if value.name == "attention_mask"]:
        if value.uses():
            raise _refused(f"{next(iter(value.uses())).node.op_type} reads attention_mask beside the attention")
        graph.inputs.remove(value)


def _is_batch_size(node: ir.Node) -> bool:
    attributes = node.attributes
    return node.op_type == "Shape" and attributes.get_int("start", 0) == 0 and attributes.get_int("end", 4) in (1, -3)


class _Slots:
    """What all layers share: which keys are seen, at which places, and what stands in the slots afterwards."""

    def __init__(self, graph: ir.Graph, sinks: int, window: int) -> None:
        self.graph, self.size = graph, sinks + window
        self.before = next(iter(graph))
        """Where nodes are added."""
        self.inputs = {value.name: value for value in graph.inputs}
        if "position_ids" not in self.inputs:
            raise _refused("the graph has no position_ids, which say where each row stands")
        self.new = self.inputs["position_ids"]
        add, flag = self.add, ir.DataType.BOOL
        C, W, S0, zero, one, two, end = (
            constant(graph, [n]) for n in (sinks + window, window, sinks, 0, 1, 2, self.size - 1)
        )
        past = add("Slice", [self.new, zero, one, one])
        newest = add("Sub", [past, one])
        last = add("Add", [newest, add("Shape", [self.new], {"start": 1, "end": 2})])
        slots = numbers(graph, self.size)
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
        self.joined: dict[ir.Value, ir.Value] = {}
        self.copies: dict[tuple[ir.Value, ir.Value], ir.Value] = {}
        self.proved: set[tuple[ir.Value, ir.Value]] = set()

    def add(
        self, op: str, inputs: Sequence[Any], attributes: Any = None, kind: ir.DataType | None = ir.DataType.INT64
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes)
        if kind is not None:
            node.outputs[0].dtype = kind
        self.graph.insert_before(self.before, node)
        return node.outputs[0]

    def rotation(self, rotary: ir.Node, places: ir.Value) -> list[ir.Value]:
        """cos and sin of a RotaryEmbedding, at other places than position_ids."""
        cos, sin = rotary.inputs[1], rotary.inputs[2]
        assert cos is not None and sin is not None
        found = [self._copy(value, places) for value in (cos, sin)]
        if (cos, sin) not in self.proved and places is self.places:
            why = not_relative(self.graph, places, found, self.size)
            if why is not None:
                raise _refused(f"the rotation {rotary.name} tells more than distances: {why}")
            self.proved.add((cos, sin))
        return found

    def _copy(self, value: ir.Value, places: ir.Value) -> ir.Value:
        """The same value, computed from `places` instead of position_ids."""
        if value is self.new:
            return places
        if (value, places) in self.copies:
            return self.copies[value, places]
        node = value.producer()
        if node is None:
            if value.is_graph_input():
                raise _refused(f"{value.name} has a part in a rotation")
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


class _Layer:
    """One Attention with a past, made to read and to write the cache."""

    def __init__(self, node: ir.Node, slots: _Slots) -> None:
        self.node, self.slots, self.graph = node, slots, slots.graph
        slots.before = node

    def rewrite(self) -> None:
        node, slots, add = self.node, self.slots, self.slots.add
        q, k, v, _, past_keys, past_values = node.inputs[:6]
        assert q is not None and k is not None and v is not None and past_keys is not None and past_values is not None
        kind, size = past_keys.dtype, past_keys.shape and past_keys.shape[3]
        if kind is None or not isinstance(size, int):
            raise _refused(f"{past_keys.name} is of no known type or size")
        if node.attributes.get_int("is_causal", 0) or len(node.outputs) != 3:
            raise _refused(f"the attention {node.name} is causal by its attribute, or gives its scores")
        q_rotary, k_rotary = self._rotary(q, "queries"), self._rotary(k, "keys")
        if q_rotary.inputs[1:] != k_rotary.inputs[1:] or _turns(q_rotary) != _turns(k_rotary):
            raise _refused(f"the attention {node.name} has queries that are not rotated as keys are")
        keys = self._cached(past_keys, self._rotated_by(k_rotary), node.outputs[1])
        values = self._cached(past_values, self._heads(v, "kv_num_heads"), node.outputs[2])
        queries = self._rotated_by(q_rotary)

        keys = self._rotate(k_rotary, keys, slots.places)
        none = initializer(self.graph, f"fxfuse.none_{kind.name.lower()}", ir.tensor(np.zeros((), kind.numpy())))
        apart = [add("Where", [slots.sink, *pair], kind=kind) for pair in ((none, keys), (keys, none))]
        both = [self._rotate(q_rotary, queries, places) for places in (slots.recent_places, slots.sink_places)]
        queries, keys = (add("Concat", halves, {"axis": -1}, kind) for halves in (both, apart))

        attributes = {n: a for n, a in node.attributes.items() if n not in ("q_num_heads", "kv_num_heads")}
        attributes.setdefault("scale", ir.AttrFloat32("scale", 1 / math.sqrt(size)))
        result = add("Attention", [queries, keys, values, slots.mask], attributes, kind)
        old = node.outputs[0]
        if "q_num_heads" in node.attributes:
            result = add("Transpose", [result], {"perm": [0, 2, 1, 3]}, kind)
            result = add("Reshape", [result, constant(self.graph, [0, 0, -1])], kind=kind)
        result.shape = old.shape
        old.replace_all_uses_with(result)
        self.graph.remove(node, safe=True)

    def _rotary(self, value: ir.Value, what: str) -> ir.Node:
        """The RotaryEmbedding that gives queries or keys, perhaps before its heads are apart."""
        node, rank = value.producer(), 3 if "q_num_heads" in self.node.attributes else 4
        apart = node if node is not None and node.op_type == "Transpose" else None
        if apart is not None and rank == 4 and list(apart.attributes["perm"].as_ints()) == [0, 2, 1, 3]:
            reshape = apart.inputs[0].producer() if apart.inputs[0] is not None else None
            if reshape is not None and reshape.op_type == "Reshape" and reshape.inputs[0] is not None:
                node, rank = reshape.inputs[0].producer(), 3
        if node is None or node.op_type != "RotaryEmbedding":
            raise _refused(f"no RotaryEmbedding gives the {what} of {self.node.name}")
        if _rank(node.inputs[0]) != rank:
            raise _refused(f"the rotation {node.name} is not of [B, S, H·D] or [B, H, S, D]")
        if len(node.inputs) != 3:
            raise _refused(f"the rotation {node.name} picks cos and sin by positions of its own")
        return node

    def _rotated_by(self, rotary: ir.Node) -> ir.Value:
        """What a RotaryEmbedding takes, as [B, H, S, D]."""
        value = rotary.inputs[0]
        assert value is not None
        return self._apart(value, rotary.attributes["num_heads"].as_int()) if _rank(value) == 3 else value

    def _heads(self, value: ir.Value, attribute: str) -> ir.Value:
        attributes = self.node.attributes
        return self._apart(value, attributes[attribute].as_int()) if attribute in attributes else value

    def _apart(self, value: ir.Value, heads: int) -> ir.Value:
        """[B, S, H·D] as [B, H, S, D]."""
        shape = constant(self.graph, [0, 0, heads, -1])
        apart = self.slots.add("Reshape", [value, shape], kind=value.dtype)
        return self.slots.add("Transpose", [apart], {"perm": [0, 2, 1, 3]}, value.dtype)

    def _rotate(self, rotary: ir.Node, value: ir.Value, places: ir.Value) -> ir.Value:
        attributes = {name: a for name, a in rotary.attributes.items() if name != "num_heads"}
        inputs = [value, *self.slots.rotation(rotary, places)]
        return self.slots.add("RotaryEmbedding", inputs, attributes, value.dtype)

    def _cached(self, past: ir.Value, new: ir.Value, grown: ir.Value) -> ir.Value:
        """Cache and new tokens [B, H, C + S, D]; the graph gives back what is kept of them."""
        add = self.slots.add
        outputs = self.graph.outputs
        if grown.name != present_of(past.name or "") or grown.uses() or not grown.is_graph_output():
            raise _refused(f"{past.name} grows, and is not just given back")
        assert past.shape is not None
        batch, heads, _, size = past.shape
        if not isinstance(heads, int):
            raise _refused(f"{past.name} has a number of heads that is not fixed")
        past.shape = ir.Shape([batch, heads, self.slots.size, size])
        both = add("Concat", [past, new], {"axis": 2}, past.dtype)
        self.slots.joined[past] = both
        index = add("Expand", [self.slots.source, constant(self.graph, [1, heads, 1, 1])])
        kept = add("GatherND", [both, index], {"batch_dims": 2}, past.dtype)
        kept.shape, kept.name, grown.name = past.shape, grown.name, None
        outputs[[output is grown for output in outputs].index(True)] = kept
        return both


def _turns(rotary: ir.Node) -> list[int | None]:
    return [rotary.attributes.get_int(name, 0) for name in ("interleaved", "rotary_embedding_dim")]


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _refused(why: str) -> FxfuseError:
    return FxfuseError(
        f"the cache cannot be of sinks and a window: {why}", where="cache", hint='cache="growing" leaves it as it is'
    )
