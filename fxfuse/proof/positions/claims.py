"""What a pattern may say of values that a program computes from positions and sizes: each read, and then decided.

A claim holds for every size that the program admits, or it is not made: the tensor stays an input then, which is always
right.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, permutations
from typing import Any

import torch
from torch.fx import Node

from fxfuse.graph.view import fake, is_random
from fxfuse.proof.positions.decide import Fails, Holds, Undecided, Verdict, always
from fxfuse.proof.positions.reader import Index, Reader, Unreadable
from fxfuse.proof.positions.tables import spread
from fxfuse.proof.positions.terms import Term

MASKS = {torch.float16: -32752.0}
"""A number from here down masks: scores lie above it. Half precision has its own."""
MASK = -1e8
_ORDERS = 24
"""Of the parts of a sum, how many are tried."""


def masks_from(dtype: torch.dtype) -> float:
    """What is added or filled in at or below this is a mask, for scores above it."""
    return MASKS.get(dtype, MASK)


def one_number(reader: Reader, node: Node) -> Term | None:
    """The term of a tensor that is one number throughout, whatever the sizes and inputs; None where it is not."""
    try:
        term = reader.read(node, reader.index(node))
    except Unreadable:
        return None
    return term if not term.leaves and not is_random(node) else None


def counts_up(reader: Reader, node: Node) -> Verdict:
    """Is element i of this index tensor i, at every length: does picking by it change nothing?"""
    value = fake(node)
    if value.dim() != 1:
        return Undecided("it has more than one axis")
    index = reader.index(node)
    try:
        term = reader.read(node, index)
    except Unreadable as error:
        return Undecided(f"{error} cannot be read")
    return always(reader.terms, reader.terms.equal(reader.terms.as_int(term), index[0]), bounds_of(reader, node, index))


def same_at_every_size(reader: Reader, node: Node) -> bool:
    """Does the element depend on nothing but its own place, so that a longer tensor only goes on with it?"""
    index = reader.index(node)
    try:
        term = reader.read(node, index)
    except Unreadable:
        return False
    own = {i.args[0] for i in index if i.op == "variable"}
    return not term.leaves - own - set(_tables(term))


def _tables(term: Term) -> list[str]:
    return [str(t.args[0]) for t in term.walk() if t.op == "given" and str(t.args[0]).startswith("table ")]


def bounds_of(reader: Reader, node: Node, index: Index) -> list[Term]:
    """Each index is below the size of its axis."""
    t = reader.terms
    return [t.less(i, size) for i, size in zip(index, reader.shape(node), strict=True) if i.number is None]


def triangle(
    reader: Reader, node: Node, index: Index, row: Term, column: Term, low: Any, high: Any, given: Sequence[Term] = ()
) -> Verdict:
    """Is the element `low` where column <= row, and `high` elsewhere?

    Args:
        index: of `node`, in which row and column stand.
        low, high: numbers.
    """
    t = reader.terms
    try:
        term = reader.read(node, index)
    except Unreadable as error:
        return Undecided(f"{error} cannot be read")
    kept = t.at_most(column, row)
    return always(t, t.choose(kept, _is(reader, term, low), _is(reader, term, high)), given)


def _is(reader: Reader, term: Term, value: Any) -> Term:
    from fxfuse.proof.positions.tables import number

    return reader.terms.equal(reader.terms.as_int(term), reader.terms.as_int(number(reader.terms, value)))


def causal(
    reader: Reader, masks: Sequence[tuple[Node, Index, bool | float]], row: Term, column: Term, sizes: Sequence[Any]
) -> Verdict:
    """Do the masks together keep exactly the keys up to the query's own place?

    Args:
        masks: each with its index, and whether True keeps a key; or, where it is added, with its factor.
        row, column: of the scores.
        sizes: how many rows and columns there are.
    """
    t = reader.terms
    kept: list[Term] = []
    plain: list[Term] = []
    given = [t.less(place, reader.size(size)) for place, size in zip((row, column), sizes, strict=True)]
    for node, index, way in masks:
        try:
            term = reader.read(node, index)
        except Unreadable as error:
            return Undecided(f"{error} cannot be read")
        given += bounds_of(reader, node, index)
        if isinstance(way, bool):
            condition = t.as_bool(term)
            kept.append(condition if way else t.opposite(condition))
        else:
            nothing = t.equal(t.as_int(term), t.number(0))
            lowest = masks_from(fake(node).dtype)
            hides = t.at_most(t.as_int(term), t.number(lowest / way)) if way > 0 else t.false
            kept.append(nothing)
            plain.append(t.any([nothing, hides]))
    seen = t.at_most(column, row)
    condition = t.every([t.equal(t.every(kept), seen), *plain])
    symbols = sorted(reader.size(s).args[0] for s in sizes[:1] if reader.size(s).op == "variable")
    verdict = always(t, condition, given, smallest=[*symbols, row.args[0], column.args[0]])
    if isinstance(verdict, Holds) and isinstance(always(t, t.false, [*given, t.less(row, column)]), Holds):
        return Undecided("no query has a later key at any size")  # of nothing everything holds
    return verdict


def said_of_causal(verdict: Verdict, row: Term, column: Term, size: Term) -> str:
    """Why masks are kept as they are: where they differ from the causal one."""
    if isinstance(verdict, Fails):
        at = verdict.values
        length = f" at length {at[size.args[0]]}" if size.op == "variable" and size.args[0] in at else ""
        query, key = at.get(row.args[0], 0), at.get(column.args[0], 0)
        does = "does not see" if key <= query else "sees"
        return f"not causal:{length} query {query} {does} key {key}"
    return (
        f"whether it is causal at every length cannot be told: {verdict.why}" if isinstance(verdict, Undecided) else ""
    )


def equal_terms(reader: Reader, one: Term, two: Term, at: str) -> bool:
    """Are the two elements the same computation? Elements of tables are compared over all that the variable `at` may
    be, whole: every row and every head.
    """
    if one is two:
        return True
    if one.op != two.op or len(one.args) != len(two.args) or one.kind != two.kind:
        return False
    if one.op == "given" and one.args[0] == two.args[0]:
        return _same_in_table(reader, one, two, at)
    if one.op == "sum":
        if one.args[0] != two.args[0] or len(one.args[1]) != len(two.args[1]):
            return False
        return any(
            all(c == d and equal_terms(reader, a, b, at) for (a, c), (b, d) in zip(one.args[1], order, strict=True))
            for order in islice(permutations(two.args[1]), _ORDERS)
        )
    if _is_product(one) and len(one.args) == len(two.args):  # the one of its factors that was read first stands first
        *same, a, b = one.args
        *other, c, d = two.args
        if same != other:
            return False
        return any(
            equal_terms(reader, a, first, at) and equal_terms(reader, b, second, at)
            for first, second in ((c, d), (d, c))
        )
    for a, b in zip(one.args, two.args, strict=True):
        if isinstance(a, Term) and isinstance(b, Term):
            if not equal_terms(reader, a, b, at):
                return False
        elif a != b:
            return False
    return True


def _is_product(term: Term) -> bool:
    return term.op == "product" or (term.op == "apply" and str(term.args[0]).startswith("product in "))


def _same_in_table(reader: Reader, one: Term, two: Term, at: str) -> bool:
    """Every row and head of the table is met."""
    table = reader.tables.get(str(one.args[0]).removeprefix("table "))
    if table is None:
        return False
    for axis, (a, b) in enumerate(zip(one.args[1:], two.args[1:], strict=True)):
        if a is b:
            continue
        if (a.leaves | b.leaves) - {at}:
            return False
        places = spread(a), spread(b)
        if places[0] is None or places[1] is None or len(places[0]) != len(places[1]):
            return False
        first, second = (table.index_select(axis, torch.tensor(p, device=table.device)) for p in places)
        if not torch.equal(first, second):
            return False
    return True
