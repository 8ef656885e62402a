"""Regions to ask an example about: what leads from as many tensors as it has to one value, however long the way is."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from fxfuse.graph.region import Region, between
from fxfuse.graph.view import GraphView, is_pure, op_name, tensor

MAX_NODES = 160
"""Nodes of a region, at most."""
MAX_STATES = 192
"""Sets of nodes that are looked at before one value, at most."""


@dataclass
class Searched:
    """What became of the search in one graph."""

    values: int = 0
    """At how many values it was searched,"""
    bounded: int = 0
    """and at how many of them it ended at a bound."""


def regions(view: GraphView, output: Node, count: int, searched: Searched) -> Iterator[Region]:
    """Regions that end at `output` and read exactly `count` tensors, each once.

    First those that a straight way back meets: it takes in the latest node over and over, as far as what it takes in is
    read by nobody else, or as far as it can. Then the others, small ones first; of the many ways to grow, those that
    read about as many tensors as are wanted come first, for the rest of a deep model lies behind every input.
    """
    searched.values += 1
    seen: set[frozenset[Node]] = set()
    for inside, cut in itertools.chain(
        _small_ones(view, output, count, 24),
        _way_back(view, output, private=True),
        _way_back(view, output, private=False),
        _grown(view, output, count, searched),
    ):
        if len(cut) != count or cut in seen:
            continue
        seen.add(cut)
        region = between(view, output, view.sorted(cut), lambda _: True, limit=MAX_NODES)
        if region is not None and not region.others and set(region.nodes) <= inside:
            yield region


State = tuple[frozenset[Node], frozenset[Node]]
"""The nodes of a region, and the tensors that they read."""


def _small_ones(view: GraphView, output: Node, count: int, states: int) -> Iterator[State]:
    return itertools.islice(_grown(view, output, count, Searched()), states)


def _way_back(view: GraphView, output: Node, *, private: bool) -> Iterator[State]:
    """One region after the other, each larger by the latest node that the last one reads.

    Args:
        private: leave out what is read elsewhere too.
    """
    inside, cut = {output}, set(_reads(output))
    while len(inside) < MAX_NODES:
        yield frozenset(inside), frozenset(cut)
        able = [n for n in cut if _grows(n) and not (private and any(u not in inside for u in n.users))]
        if not able:
            return
        node = max(able, key=view.order.__getitem__)
        inside.add(node)
        cut = (cut - {node}) | {i for i in _reads(node) if i not in inside}


def _grown(view: GraphView, output: Node, count: int, searched: Searched) -> Iterator[State]:
    first, read = frozenset({output}), frozenset(_reads(output))
    numbers = itertools.count()
    states = [(0, next(numbers), first, read)]
    seen = {first}
    while states:
        _, number, inside, cut = heapq.heappop(states)
        if number > MAX_STATES:
            searched.bounded += 1
            return
        yield inside, cut
        if len(inside) >= MAX_NODES:
            continue
        for node in view.sorted(cut)[::-1]:
            grown = inside | {node}
            if grown in seen or not _grows(node):
                continue
            seen.add(grown)
            behind = (cut - {node}) | frozenset(i for i in _reads(node) if i not in grown)
            heapq.heappush(states, (len(grown) + 3 * abs(len(behind) - count), next(numbers), grown, behind))


def _grows(node: Node) -> bool:
    return is_pure(node) and op_name(node) != ""


def _reads(node: Node) -> list[Node]:
    """The values, not the sizes, that a node is computed from."""
    return [i for i in node.all_input_nodes if tensor(i) is not None or isinstance(i.meta.get("val"), (list, tuple))]
