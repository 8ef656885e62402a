"""One attention of a streaming decoder: its keys are cached before they are rotated, so the RotaryEmbedding moves from
before the cache to behind it.

    k ─ RotaryEmbedding ─ Attention(past, present)     becomes     k ─ cache ─ RotaryEmbedding at places ─ Attention

How the cache is written, and which places its slots have, is for a `StreamingCache` to say: that of `any_tokens`, in a
graph for any number of tokens a call, or that of `one_token`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from fxfuse.decoder.names import place_of
from fxfuse.errors import FxfuseError
from fxfuse.onnx.pieces import heads_apart, heads_together


@dataclass(frozen=True)
class Turned:
    """Queries or keys that are not rotated yet, `value` [B, H, S, D], and the RotaryEmbedding that rotates them."""

    rotary: ir.Node
    value: ir.Value

    @property
    def tables(self) -> tuple[ir.Value, ir.Value]:
        """Its cos and sin."""
        cos, sin = self.rotary.inputs[1:3]
        assert cos is not None and sin is not None
        return cos, sin

    @property
    def attributes(self) -> Mapping[str, ir.Attr]:
        """Its attributes for an input [B, H, S, D], whose shape says how many heads there are."""
        return {name: a for name, a in self.rotary.attributes.items() if name != "num_heads"}


class StreamingCache(ABC):
    """What the caches of all layers share: how they are written and read. `one_token` and `any_tokens` each have one.

    Position p < sinks stands in slot p, p >= sinks in slot sinks + (p - sinks) mod W.

    Raises:
        FxfuseError: the graph has no position_ids, which say how much each row has read.
    """

    def __init__(self, graph: ir.Graph, sinks: int, window: int) -> None:
        self.graph, self.size = graph, sinks + window
        self.before = next(iter(graph))
        """The node before which others are added: the attention that is being rewritten."""
        self.inputs = {value.name: value for value in graph.inputs}
        if "position_ids" not in self.inputs:
            raise refused("the graph has no position_ids, which say where each row stands")
        self.new = self.inputs["position_ids"]
        self.readers: dict[ir.Value, ir.Node | None] = {}
        """Of each input of the cache, the node that reads it."""

    @abstractmethod
    def write(self, past: ir.Value, new: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Writes keys or values `new` [B, H, S, D] into the cache `past` [B, H, C, D].

        Returns:
            What is attended to, and the cache afterwards [B, H, C, D].
        """

    @abstractmethod
    def attend(
        self, queries: Turned, keys: Turned, values: ir.Value, attributes: Mapping[str, ir.Attr], kind: ir.DataType
    ) -> ir.Value:
        """The attention's result [B, H, S, D]; queries and keys are rotated by their places first."""

    def add(
        self, op: str, inputs: Sequence[Any], attributes: Any = None, kind: ir.DataType | None = ir.DataType.INT64
    ) -> ir.Value:
        """The output, of the type `kind`, of one more node before the attention."""
        node = ir.node(op, inputs, attributes)
        if kind is not None:
            node.outputs[0].dtype = kind
        self.graph.insert_before(self.before, node)
        return node.outputs[0]


def rewrite(node: ir.Node, cache: StreamingCache) -> None:
    """Makes one Attention with a past read and write the streaming cache.

    Raises:
        FxfuseError: it cannot be made to; the message says what is in the way.
    """
    _Layer(node, cache).rewrite()


class _Layer:
    def __init__(self, node: ir.Node, cache: StreamingCache) -> None:
        self.node, self.cache, self.graph = node, cache, cache.graph
        cache.before = node

    def rewrite(self) -> None:
        node, cache = self.node, self.cache
        q, k, v, _, past_keys, past_values = node.inputs[:6]
        assert q is not None and k is not None and v is not None and past_keys is not None and past_values is not None
        kind, size = past_keys.dtype, past_keys.shape and past_keys.shape[3]
        if kind is None or not isinstance(size, int):
            raise refused(f"{past_keys.name} is of no known type or size")
        if node.attributes.get_int("is_causal", 0) or len(node.outputs) != 3:
            raise refused(f"the attention {node.name} is causal by its attribute, or gives its scores")
        q_rotary, k_rotary = self._rotary(q, "queries"), self._rotary(k, "keys")
        if q_rotary.inputs[1:] != k_rotary.inputs[1:] or _turns(q_rotary) != _turns(k_rotary):
            raise refused(f"the attention {node.name} has queries that are not rotated as keys are")
        keys = self._cached(past_keys, self._rotated_by(k_rotary), node.outputs[1])
        values = self._cached(past_values, self._heads(v, "kv_num_heads"), node.outputs[2])
        queries = self._rotated_by(q_rotary)

        attributes = {n: a for n, a in node.attributes.items() if n not in ("q_num_heads", "kv_num_heads")}
        attributes.setdefault("scale", ir.AttrFloat32("scale", 1 / math.sqrt(size)))
        result = cache.attend(Turned(q_rotary, queries), Turned(k_rotary, keys), values, attributes, kind)
        old = node.outputs[0]
        if "q_num_heads" in node.attributes:
            result = heads_together(self.graph, self._add, result)
        result.shape, result.dtype = old.shape, kind
        old.replace_all_uses_with(result)
        self.graph.remove(node, safe=True)

    def _rotary(self, value: ir.Value, what: str) -> ir.Node:
        """The RotaryEmbedding that the queries or keys come from, directly or by way of taking heads apart."""
        node, rank = value.producer(), 3 if "q_num_heads" in self.node.attributes else 4
        apart = node if node is not None and node.op_type == "Transpose" else None
        if apart is not None and rank == 4 and list(apart.attributes["perm"].as_ints()) == [0, 2, 1, 3]:
            reshape = apart.inputs[0].producer() if apart.inputs[0] is not None else None
            if reshape is not None and reshape.op_type == "Reshape" and reshape.inputs[0] is not None:
                node, rank = reshape.inputs[0].producer(), 3
        if node is None or node.op_type != "RotaryEmbedding":
            raise refused(f"no RotaryEmbedding gives the {what} of {self.node.name}")
        if _rank(node.inputs[0]) != rank:
            raise refused(f"the rotation {node.name} is not of [B, S, H·D] or [B, H, S, D]")
        if len(node.inputs) != 3:
            raise refused(f"the rotation {node.name} picks cos and sin by positions of its own")
        return node

    def _rotated_by(self, rotary: ir.Node) -> ir.Value:
        """What a RotaryEmbedding is given, before it is rotated, as [B, H, S, D]."""
        value = rotary.inputs[0]
        assert value is not None
        if _rank(value) != 3:
            return value
        return heads_apart(self.graph, self._add, value, rotary.attributes["num_heads"].as_int())

    def _heads(self, value: ir.Value, attribute: str) -> ir.Value:
        heads = self.node.attributes.get(attribute)
        return value if heads is None else heads_apart(self.graph, self._add, value, heads.as_int())

    def _add(self, op: str, inputs: list[Any], attributes: Any = None) -> ir.Value:
        """One more node, whose output is of its first input's type."""
        return self.cache.add(op, inputs, attributes, inputs[0].dtype)

    def _cached(self, past: ir.Value, new: ir.Value, grown: ir.Value) -> ir.Value:
        """Writes `new` keys or values into the cache, and gives what is attended to. The graph gives the cache back,
        under the same name, where it gave the `grown` keys."""
        outputs, place = self.graph.outputs, place_of(past.name)
        if place is None or grown.name != place.present or grown.uses() or not grown.is_graph_output():
            raise refused(f"{past.name} grows, and is not just given back")
        assert past.shape is not None
        batch, heads, _, size = past.shape
        if not isinstance(heads, int):
            raise refused(f"{past.name} has a number of heads that is not fixed")
        past.shape = ir.Shape([batch, heads, self.cache.size, size])
        seen, kept = self.cache.write(past, new)
        self.cache.readers[past] = seen.producer()
        kept.shape, kept.name, grown.name = past.shape, grown.name, None
        outputs[[output is grown for output in outputs].index(True)] = kept
        return seen


def _turns(rotary: ir.Node) -> list[int | None]:
    return [rotary.attributes.get_int(name, 0) for name in ("interleaved", "rotary_embedding_dim")]


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def refused(why: str) -> FxfuseError:
    """The error that says why a graph cannot stream."""
    return FxfuseError(
        f"the cache cannot be of sinks and a window: {why}", where="cache", hint='cache="growing" leaves it as it is'
    )
