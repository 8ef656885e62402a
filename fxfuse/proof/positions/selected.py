"""Operators that pick elements by an index that is itself a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fxfuse.graph.view import fake
from fxfuse.proof.positions.axes import at, axis_of, fail, rank_of, source_of
from fxfuse.proof.positions.elements import Elements, Index
from fxfuse.proof.positions.terms import Term


def _index(reader: Elements, node: Node, index: Index) -> Term:
    """x[i, :, j]: the indices broadcast to one another, in the place of the first if they are side by side."""
    source = source_of(node)
    given: Any = node.args[1]
    used = [a for a, i in enumerate(given) if i is not None]
    if any(fake(given[a]).dtype == torch.bool for a in used):
        return fail("picking by a mask")
    rank = max(rank_of(given[a]) for a in used)
    first = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    inner = index[first : first + rank]
    outer = list(index[:first] + index[first + rank :])
    places: list[Term] = []
    for axis in range(rank_of(source)):
        if axis in used:
            places.append(at(reader, source, axis, reader.operand(given[axis], inner)))
        else:
            places.append(outer.pop(0))
    return reader.read(source, tuple(places))


def _embedding(reader: Elements, node: Node, index: Index) -> Term:
    weight, indices = node.args[:2]
    assert isinstance(weight, Node) and isinstance(indices, Node)
    return reader.read(weight, (reader.read(indices, index[:-1]), index[-1]))


def _index_select(reader: Elements, node: Node, index: Index) -> Term:
    source, axis = source_of(node), axis_of(node.args[1], len(index))
    indices = node.args[2]
    assert isinstance(indices, Node)
    place = reader.operand(indices, (index[axis],))
    return reader.read(source, (*index[:axis], place, *index[axis + 1 :]))


def _gather(reader: Elements, node: Node, index: Index) -> Term:
    source, axis = source_of(node), axis_of(node.args[1], len(index))
    indices = node.args[2]
    assert isinstance(indices, Node)
    return reader.read(source, (*index[:axis], reader.read(indices, index), *index[axis + 1 :]))


SELECTED: dict[str, Any] = {
    "index": _index,
    "embedding": _embedding,
    "index_select": _index_select,
    **dict.fromkeys(("gather", "take_along_dim"), _gather),
}
