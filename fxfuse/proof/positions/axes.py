"""Axes, and places along them, as the arguments of torch's operators say them."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from fxfuse.graph.view import fake
from fxfuse.proof.positions.elements import Elements
from fxfuse.proof.positions.terms import Term, Unreadable


def fail(why: str) -> Term:
    """For a rule that cannot read its operator with these arguments."""
    raise Unreadable(why)


def axis_of(value: Any, rank: int) -> int:
    """Which axis a `dim` is, which may count from the end."""
    return int(value) % max(rank, 1)


def source_of(node: Node) -> Node:
    """The tensor that is moved, sliced or picked from: the first argument."""
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def rank_of(node: Node) -> int:
    return fake(node).dim()


def listed(value: Any) -> list[Any]:
    """Of an argument that is a number, several or none."""
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def at(reader: Elements, source: Node, axis: int, place: Term) -> Term:
    """An index that counts from the end where it is below 0."""
    t = reader.terms
    if place.bounds[0] >= 0:
        return place
    size = reader.shape(source)[axis]
    if place.bounds[1] < 0:
        return t.add(place, size)
    return t.choose(t.at_most(t.number(0), place), place, t.add(place, size))


def start_of(reader: Elements, source: Node, axis: int, start: Any) -> Term:
    """Where a slice begins along an axis; a start below 0 counts from the end."""
    t = reader.terms
    begin = t.number(0) if start is None else reader.scalar(start)
    if begin.bounds[0] >= 0:
        return begin
    from_end = t.maximum(t.add(begin, reader.shape(source)[axis]), t.number(0))
    return from_end if begin.bounds[1] < 0 else t.choose(t.at_most(t.number(0), begin), begin, from_end)
