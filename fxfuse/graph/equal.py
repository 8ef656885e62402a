"""One value that is computed twice, read as one while regions are matched.

    x[:, 5:] * cos + swap(x[:, 5:]) * sin

is a rotation of one x, though the graph cuts it out twice. What reads the second of two equal values is pointed to the
first; once all is matched, whatever no fused region took in reads its own again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fxfuse.graph.region import real_users
from fxfuse.graph.spelled import call_of, cut_whole
from fxfuse.graph.view import ARITHMETIC, ASSERTIONS, CAST, LAYOUT, ROOTS, is_pure, mutated, op_name, tensor, touches

MERGED = "fxfuse_merged"
"""Marks a node that nothing reads for now because an equal one is read instead. It is no dead code."""
_SOFTMAX = frozenset(["exp", "amax", "max", "softmax", "_softmax", "where", "masked_fill"])
_PASSED = ARITHMETIC | CAST | LAYOUT | ROOTS | _SOFTMAX
_DEPTH, _LIMIT = 12, 64


@dataclass
class Merged:
    """Which node is read instead of which equal one, and what is needed to undo that."""

    first: dict[Node, Node] = field(default_factory=dict)
    """By the later of two equal values, the earlier."""
    before: dict[Node, tuple[Any, Any]] = field(default_factory=dict)
    """The arguments of the nodes that read something else now."""

    def __bool__(self) -> bool:
        return bool(self.before)


def merge_moves(graph: Graph) -> Merged:
    """Values that are the same elements of the same value, moved in the same way."""
    return _merge(graph, [n for n in graph.nodes if op_name(n) in LAYOUT], lambda node, first: True)


def merge_meeting(graph: Graph) -> Merged:
    """Values that are computed alike and meet again a few steps on: the parts of one formula.

    Others stay apart: two norms of one x begin alike, and each is a whole.
    """
    return _merge(graph, list(graph.nodes), lambda node, first: bool(_cone(node) & _cone(first)))


def computes_twice(graph: Graph) -> bool:
    """Is there anything that `merge_meeting` would merge?"""
    merged = merge_meeting(graph)
    part(graph, merged)
    return bool(merged)


def part(graph: Graph, merged: Merged) -> None:
    """Let what is still in the graph read what it read before, and take out what nothing reads any more."""
    alive = set(graph.nodes)
    for user, (args, kwargs) in merged.before.items():
        if user in alive:
            reads = _nodes((user.args, user.kwargs))
            if len(reads) != len(_nodes((args, kwargs))):
                continue  # the node was rewritten meanwhile, and its old arguments mean nothing
            now = iter(reads)

            def own(node: Node, now: Iterator[Node] = now) -> Node:
                read = next(now)
                return node if node in alive and read is merged.first.get(node) else read

            user.args, user.kwargs = map_arg(args, own), map_arg(kwargs, own)
    unread: set[Node] = set()
    for node in reversed(list(graph.nodes)):
        if node in merged.first or node in unread:
            node.meta.pop(MERGED, None)
            if not real_users(node) and is_pure(node):  # its readers were fused; assertions on it are erased with it
                unread.update(node.all_input_nodes)
                for dead in (*node.users, node):
                    graph.erase_node(dead)


def _merge(graph: Graph, nodes: list[Node], wanted: Callable[[Node, Node], bool]) -> Merged:
    merged = Merged()
    written = {root for node in graph.nodes for root in mutated(node)}
    known: dict[Hashable, Node] = {}
    same: dict[Node, Node] = {}
    for node in nodes:
        users = [u for u in node.users if u.op != "output"]
        if not any(op_name(u) not in ASSERTIONS for u in users) or not is_pure(node) or touches(node, written):
            continue
        if tensor(node) is None and not isinstance(node.meta.get("val"), (list, tuple)):
            continue
        if torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ()):
            continue  # two calls of `nonzero` give tensors whose lengths have two symbols
        if (whole := cut_whole(node)) is not None:
            same[node] = same.get(whole, whole)
            continue
        first = known.setdefault(call_of(node, same), node)
        if first is node or not wanted(node, first):
            continue
        merged.first[node] = same[node] = first
        node.meta[MERGED] = True
        for user in users:
            merged.before.setdefault(user, (user.args, user.kwargs))
            user.replace_input_with(node, first)
    return merged


def _cone(start: Node) -> set[Node]:
    """What is computed of a value in a few steps."""
    found = {start}
    level = [start]
    for _ in range(_DEPTH):
        level = [u for n in level for u in n.users if u not in found and op_name(u) in _PASSED]
        found.update(level)
        if not level or len(found) > _LIMIT:
            break
    return found


def _nodes(args: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(args, lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found
