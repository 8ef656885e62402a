"""A spelling-free view of an export graph: order, shapes, and values that are equal.

It is also where other rooms take from what kinds of operators there are (`vocabulary`), what one node is (`nodes`) and
what shares storage (`storages`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.fx import Graph, Node

from fxfuse.graph.marks import DETACHED, LOWERED
from fxfuse.graph.nodes import argument, fake, is_float, is_pure, is_random, is_size, op_name, size_text, static, tensor
from fxfuse.graph.storages import bases, mutated, storage_roots, touches
from fxfuse.graph.vocabulary import (
    ALIASES,
    ARITHMETIC,
    ASSERTIONS,
    BLANK,
    CAST,
    CONTRACTION,
    LAYOUT,
    NO_OP,
    ROOTS,
    SCATTERS,
    UNSET,
)


class GraphView:
    """Order, shapes and equal values of one graph. It is a snapshot: build a new one after editing."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = list(graph.nodes)
        self.order = {node: position for position, node in enumerate(self.nodes)}
        self._shapes: dict[Node, tuple[str, ...]] = {}
        self.mutations = [(self.order[n], storages) for n in self.nodes if (storages := mutated(n))]
        self._first = self._number()

    def shape(self, node: Node) -> tuple[str, ...]:
        """The symbolic shape as text: equal text, equal sizes; nothing is guarded on."""
        found = self._shapes.get(node)
        if found is None:
            value = tensor(node)
            found = () if value is None else tuple(map(size_text, value.shape))
            self._shapes[node] = found
        return found

    def same_shape(self, a: Node, b: Node) -> bool:
        return self.shape(a) == self.shape(b) and tensor(a) is not None

    def canonical(self, node: Node) -> Node:
        """The first node of the graph that computes the same value in the same way."""
        return self._first.get(node, node)

    def sorted(self, nodes: Iterable[Node]) -> list[Node]:
        return sorted(nodes, key=self.order.__getitem__)

    def mutated_between(self, nodes: Iterable[Node], start: int, stop: int) -> bool:
        """Is the storage of one of these nodes written in place between two positions?"""
        writes = [storages for position, storages in self.mutations if start < position < stop]
        if not writes:
            return False
        mine = {root for node in nodes for root in storage_roots(node)}
        return any(mine & storages for storages in writes)

    def _number(self) -> dict[Node, Node]:
        """Value numbering of pure nodes; whatever an in-place write may touch equals only itself."""
        written = {root for _, storages in self.mutations for root in storages}
        first: dict[Any, Node] = {}
        result: dict[Node, Node] = {}

        def number(arg: Any) -> Any:
            if isinstance(arg, Node):
                return ("node", result.get(arg, arg))
            if isinstance(arg, (list, tuple)):
                return tuple(number(a) for a in arg)
            return (type(arg).__name__, repr(arg)) if not isinstance(arg, slice) else repr(arg)

        for node in self.nodes:
            result[node] = node
            if not is_pure(node) or touches(node, written):
                continue
            key = (node.target, number(node.args), tuple((k, number(v)) for k, v in sorted(node.kwargs.items())))
            result[node] = first.setdefault(key, node)
        return result


__all__ = [
    "ALIASES",
    "ARITHMETIC",
    "ASSERTIONS",
    "BLANK",
    "CAST",
    "CONTRACTION",
    "DETACHED",
    "LAYOUT",
    "LOWERED",
    "NO_OP",
    "ROOTS",
    "SCATTERS",
    "UNSET",
    "GraphView",
    "argument",
    "bases",
    "fake",
    "is_float",
    "is_pure",
    "is_random",
    "is_size",
    "mutated",
    "op_name",
    "size_text",
    "static",
    "storage_roots",
    "tensor",
    "touches",
]
