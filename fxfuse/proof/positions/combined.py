"""Operators whose element is computed from several elements: products of vectors and matrices, running sums."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fxfuse.graph.view import fake
from fxfuse.proof.arithmetic import kept, times
from fxfuse.proof.positions.axes import axis_of, fail, rank_of, source_of
from fxfuse.proof.positions.elements import Elements, Index
from fxfuse.proof.positions.terms import Term
from fxfuse.proof.positions.views import is_one

_WRAPPED = (torch.bool, torch.int8, torch.uint8, torch.int16, torch.float16, torch.bfloat16)
"""In these types a difference may wrap or be rounded: it is not the difference of the whole numbers."""


def _outer(reader: Elements, node: Node, index: Index) -> Term:
    first, second = node.args[:2]
    one, two = reader.operand(first, (index[0],)), reader.operand(second, (index[1],))
    return times(reader.terms, fake(node).dtype, one, two)


def _matmul(reader: Elements, node: Node, index: Index) -> Term:
    """A product of matrices over a short axis only: angles are positions [S, 1] times frequencies [1, D]."""
    left, right = node.args[:2]
    assert isinstance(left, Node) and isinstance(right, Node)
    count = fake(left).shape[-1]
    if not isinstance(count, int) or count > 4 or min(rank_of(left), rank_of(right)) < 2:
        return fail("a product of matrices")
    lead, (row, column) = index[:-2], index[-2:]
    t = reader.terms
    parts = []
    for number in range(count):
        inner = t.number(number)
        one = reader.operand(left, (*lead, row, inner))
        two = reader.operand(right, (*lead, inner, column))
        parts.append(times(reader.terms, fake(node).dtype, one, two))
    return parts[0] if count == 1 else t.apply("sum of products", tuple(parts), "real")


def _einsum(reader: Elements, node: Node, index: Index) -> Term:
    """An einsum that sums over nothing, which is an outer product."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    inputs, _, out = equation.partition("->")
    letters = inputs.split(",")
    if (
        not isinstance(operands, (list, tuple))
        or len(letters) != 2
        or "." in equation
        or set("".join(letters)) - set(out)
    ):
        return fail("einsum")
    place = dict(zip(out, index, strict=True))
    one, two = (reader.operand(o, tuple(place[c] for c in names)) for o, names in zip(operands, letters, strict=True))
    return times(reader.terms, fake(node).dtype, one, two)


def _cumsum(reader: Elements, node: Node, index: Index) -> Term:
    """A running sum of one and the same number along the axis, which is the number times the place."""
    axis = axis_of(node.args[1], len(index))
    t = reader.terms
    with reader.anywhere() as place:
        term = t.as_int(reader.read(source_of(node), (*index[:axis], place, *index[axis + 1 :])))
    if term.kind != "int" or not place.leaves.isdisjoint(term.leaves):
        return fail("cumsum")
    return kept(t, t.multiply(term, t.add(index[axis], t.number(1))), fake(node).dtype) or fail("cumsum")


def _whole(term: Term) -> Term:
    return term if term.kind == "int" else fail("a difference of fractions")


def _diff(reader: Elements, node: Node, index: Index) -> Term:
    """Differences of neighbours. If the prepended element goes on with the count, the first difference is as all others
    are."""
    given = dict(zip(("n", "dim", "prepend", "append"), node.args[1:], strict=False)) | dict(node.kwargs)
    axis = axis_of(given.get("dim", -1), len(index))
    if given.get("n", 1) != 1 or given.get("append") is not None or fake(node).dtype in _WRAPPED:
        return fail("diff")
    source, t = source_of(node), reader.terms
    before = given.get("prepend")

    def element(place: Term) -> Term:
        return _whole(reader.read(source, (*index[:axis], place, *index[axis + 1 :])))

    one = t.number(1)
    if before is None:
        return t.subtract(element(t.add(index[axis], one)), element(index[axis]))
    if not isinstance(before, Node) or not is_one(fake(before).shape[axis]):
        return fail("diff")
    last = t.subtract(index[axis], one)
    steady = t.subtract(element(index[axis]), element(last))
    first = _whole(reader.read(before, (*index[:axis], t.number(0), *index[axis + 1 :])))
    if element(t.number(-1)) is first:
        return steady
    return t.choose(t.equal(index[axis], t.number(0)), t.subtract(element(index[axis]), first), steady)


COMBINED: dict[str, Any] = {
    "outer": _outer,
    **dict.fromkeys(("matmul", "bmm", "mm"), _matmul),
    "einsum": _einsum,
    "cumsum": _cumsum,
    "diff": _diff,
}
