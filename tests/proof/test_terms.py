"""Terms: equal ones are one object, and each is at every place what Python says."""

from __future__ import annotations

import math
from itertools import product

import pytest

from fxfuse.proof.positions.terms import POSITIONS, Term, Terms, value_of

PLACES = [dict(zip("ijn", at, strict=True)) for at in product((0, 1, 2, 5, 8), (0, 1, 3, 7), (1, 2, 9))]
BY = (1, 2, 3, 8)


def variables(t: Terms) -> tuple[Term, Term, Term]:
    return t.variable("i"), t.variable("j"), t.variable("n", 1)


def whole(t: Terms):
    """Terms, each with what it is."""
    i, j, n = variables(t)
    yield t.add(i, j, t.number(3)), lambda i, j, n: i + j + 3
    yield t.subtract(t.scale(i, 3), t.scale(j, 5)), lambda i, j, n: 3 * i - 5 * j
    yield t.multiply(t.add(i, n), j), lambda i, j, n: (i + n) * j
    yield t.minimum(t.subtract(i, j), n), lambda i, j, n: min(i - j, n)
    yield t.maximum(t.subtract(i, j), t.negative(n)), lambda i, j, n: max(i - j, -n)
    yield t.absolute(t.subtract(i, j)), lambda i, j, n: abs(i - j)
    yield t.choose(t.less(i, j), n, i), lambda i, j, n: n if i < j else i
    for by in BY:
        for term, value in (
            (t.subtract(i, j), lambda i, j, n: i - j),
            (t.add(t.scale(i, 6), n), lambda i, j, n: 6 * i + n),
        ):
            yield t.divide(term, by), lambda i, j, n, by=by, value=value: value(i, j, n) // by
            yield t.remainder(term, by), lambda i, j, n, by=by, value=value: value(i, j, n) % by
            twice = t.divide(t.divide(term, by), 2)
            yield twice, lambda i, j, n, by=by, value=value: value(i, j, n) // by // 2


def conditions(t: Terms):
    i, j, n = variables(t)
    yield t.at_most(i, j), lambda i, j, n: i <= j
    yield t.less(t.add(i, t.number(2)), t.scale(j, 2)), lambda i, j, n: i + 2 < 2 * j
    yield t.equal(t.remainder(i, 3), t.remainder(j, 3)), lambda i, j, n: i % 3 == j % 3
    yield t.opposite(t.equal(i, j)), lambda i, j, n: i != j
    yield t.every([t.less(i, n), t.less(j, n), t.at_most(j, i)]), lambda i, j, n: i < n and j < n and j <= i
    yield t.any([t.less(i, j), t.equal(i, n)]), lambda i, j, n: i < j or i == n
    yield t.choose(t.less(i, j), t.less(i, n), t.equal(j, n)), lambda i, j, n: i < n if i < j else j == n
    yield t.at_most(i, t.number(2.5)), lambda i, j, n: i <= 2.5
    yield t.less(i, t.number(2.0)), lambda i, j, n: i < 2
    yield t.less(t.number(-0.5), t.subtract(i, j)), lambda i, j, n: i - j > -0.5
    yield t.equal(i, t.number(2.5)), lambda i, j, n: False
    yield t.at_most(t.number(-math.inf), i), lambda i, j, n: True
    yield t.at_most(t.number(math.inf), i), lambda i, j, n: False
    yield t.less(i, t.number(math.inf)), lambda i, j, n: True
    yield t.less(t.choose(t.at_most(j, i), t.number(0), t.number(-math.inf)), t.number(-1e9)), lambda i, j, n: j > i


@pytest.mark.parametrize("kind", [whole, conditions])
def test_every_term_is_what_it_says(kind) -> None:
    for term, value in kind(Terms()):
        for at in PLACES:
            assert value_of(term, at) == value(**at), (term, at)


@pytest.mark.parametrize("kind", [whole, conditions])
def test_bounds_hold(kind) -> None:
    for term, value in kind(Terms()):
        for at in PLACES:
            if term.kind == "int":
                assert term.bounds[0] <= value(**at) <= term.bounds[1]
                assert term.reach[0] <= value(**at) <= term.reach[1]


def test_the_same_computation_is_one_object() -> None:
    t = Terms()
    i, j, _ = variables(t)
    assert t.add(i, j) is t.add(j, i)
    assert t.subtract(t.add(i, j), j) is i
    assert t.opposite(t.opposite(t.equal(i, j))) is t.equal(j, i)
    assert t.less(j, i) is t.opposite(t.at_most(i, j))
    assert t.divide(t.add(t.scale(i, 6), j), 3) is t.add(t.scale(i, 2), t.divide(j, 3))
    assert t.every([t.less(i, j), t.at_most(j, i)]) is t.false
    assert t.multiply(t.as_int(t.less(i, j)), i) is t.choose(t.less(i, j), i, t.number(0))


def test_a_float_is_another_number_than_the_integer() -> None:
    t = Terms()
    assert len({t.number(1), t.number(1.0), t.number(True)}) == 3
    assert t.equal(t.number(1), t.number(1.0)) is t.true


def test_a_name_with_other_bounds_is_another_variable() -> None:
    """Indices of two tensors are named alike; the sizes of one say nothing of the other."""
    t = Terms()
    short, long = t.variable("i0", 0, 3), t.variable("i0", 0, 63)
    assert short is not long
    assert t.at_most(short, t.number(3)) is t.true
    assert t.at_most(long, t.number(3)).number is None


def test_what_may_be_no_number_is_not_equal_to_itself() -> None:
    t = Terms()
    root = t.apply("log", (t.variable("i"),), "real")
    assert t.equal(root, root) is not t.true
    assert t.equal(t.number(math.nan), t.number(math.nan)) is not t.true
    assert t.equal(t.variable("i"), t.variable("i")) is t.true


def test_how_far_positions_reach() -> None:
    t = Terms()
    i = t.variable("i")
    assert i.bounds[1] == math.inf and i.reach == (0, POSITIONS)
    assert t.scale(i, -3).reach == (-3 * POSITIONS, 0)
    assert t.remainder(i, 7).reach == (0, 6)
    assert t.choose(t.less(i, t.number(5)), t.number(-2), t.divide(i, 4)).reach == (-2, POSITIONS // 4)
