"""Whether a condition holds at every size; and where not, a place where it does not."""

from __future__ import annotations

import pytest

from fxfuse.proof.positions.decide import Fails, Holds, Undecided, always
from fxfuse.proof.positions.terms import Term, Terms, value_of


def window(t: Terms, i: Term, j: Term, width: int) -> Term:
    return t.every([t.at_most(j, i), t.less(t.subtract(i, j), t.number(width))])


def places(t: Terms, most: float = float("inf")) -> tuple[Term, Term, Term, list[Term]]:
    """A row, a column and a length; both are below the length."""
    i, j, n = t.variable("i"), t.variable("j"), t.variable("n", 1, most)
    return i, j, n, [t.less(i, n), t.less(j, n)]


def equal(t: Terms, a: Term, b: Term) -> Term:
    return t.choose(a, b, t.opposite(b))


@pytest.mark.parametrize("width", [1, 2, 64, 4097, 100_000])
def test_a_window_is_not_causal_beyond_its_width(width: int) -> None:
    """The smallest length and row that show it are given."""
    t = Terms()
    i, j, _, given = places(t)
    condition = equal(t, window(t, i, j, width), t.at_most(j, i))
    verdict = always(t, condition, given, smallest=["n", "i", "j"])
    assert isinstance(verdict, Fails)
    assert verdict.values == {"n": width + 1, "i": width, "j": 0}
    assert not value_of(condition, verdict.values) and all(value_of(g, verdict.values) for g in given)


@pytest.mark.parametrize(("most", "holds"), [(64, True), (65, False)])
def test_a_length_that_the_program_bounds_is_used(most: int, holds: bool) -> None:
    t = Terms()
    i, j, _, given = places(t, most)
    verdict = always(t, equal(t, window(t, i, j, 64), t.at_most(j, i)), given)
    assert isinstance(verdict, Holds if holds else Fails)


def spelled(t: Terms, i: Term, j: Term):
    """Ways to say j <= i."""
    yield t.less(j, t.add(i, t.number(1)))
    yield t.opposite(t.less(i, j))
    yield t.at_most(t.scale(j, 2), t.add(t.scale(i, 2), t.number(1)))
    yield t.at_most(t.number(0), t.subtract(i, j))
    yield t.at_most(t.divide(t.scale(j, 6), 3), t.divide(t.add(t.scale(i, 4), t.number(1)), 2))
    yield t.equal(t.minimum(j, i), j)
    yield t.at_most(t.absolute(t.subtract(i, j)), t.subtract(i, j))


def nearly(t: Terms, i: Term, j: Term):
    """And ways not to."""
    yield t.at_most(t.divide(j, 2), t.divide(i, 2))
    yield t.at_most(t.remainder(j, 4096), t.remainder(i, 4096))
    yield t.at_most(t.scale(j, 3), t.add(t.scale(i, 3), t.number(3)))
    yield t.at_most(t.divide(j, 300), t.divide(i, 300))
    yield t.every([t.at_most(j, i), t.opposite(t.equal(j, t.number(5000)))])
    yield t.at_most(t.minimum(j, t.number(777)), i)


def test_spellings_of_one_condition_are_one() -> None:
    t = Terms()
    i, j, _, given = places(t)
    for condition in spelled(t, i, j):
        assert isinstance(always(t, equal(t, condition, t.at_most(j, i)), given), Holds), condition


def test_near_misses_fail_where_they_differ() -> None:
    t = Terms()
    i, j, _, given = places(t)
    for condition in nearly(t, i, j):
        whole = equal(t, condition, t.at_most(j, i))
        verdict = always(t, whole, given)
        assert isinstance(verdict, Fails), condition
        values = {"i": 0, "j": 0, "n": 1} | verdict.values
        assert not value_of(whole, values) and all(value_of(g, values) for g in given)


def test_nothing_is_claimed_of_what_is_not_known() -> None:
    """Of a step that is not known, or of values that an input has, there is no counterexample either."""
    t = Terms()
    i, j, _, given = places(t)
    steps = t.apply("aten.cos", (i,), "real"), t.given("lengths", (i,), "int")
    for step in steps:
        bound = t.at_most(step, t.number(3))
        verdict = always(t, t.any([bound, t.less(i, j)]), given)
        assert isinstance(verdict, Undecided) and ("cos" in verdict.why or "lengths" in verdict.why)
        assert isinstance(always(t, t.any([bound, t.opposite(bound)]), given), Holds)


def test_a_table_is_one_function_of_its_index() -> None:
    t = Terms()
    i, j, _, given = places(t)
    at_i, at_j = (t.given("table slopes", (k,), "int") for k in (i, j))
    assert isinstance(always(t, t.equal(at_i, at_j), [t.equal(i, j), *given]), Holds)
    assert isinstance(always(t, t.equal(at_i, at_j), given), Undecided)


def test_under_conditions_that_cannot_be_met_all_holds() -> None:
    t = Terms()
    i, j, _, given = places(t)
    assert isinstance(always(t, t.false, [t.less(i, j), t.less(j, i), *given]), Holds)
    assert isinstance(always(t, t.false, [t.false]), Holds)


def test_products_of_positions_are_decided_or_left() -> None:
    """Squares: right where z3 comes to an answer, and no claim where it does not."""
    t = Terms()
    i, j, n, given = places(t)
    squares = t.at_most(t.multiply(j, j), t.multiply(i, i))
    assert isinstance(always(t, equal(t, squares, t.at_most(j, i)), given), (Holds, Undecided))
    hard = t.at_most(t.multiply(t.multiply(j, n), i), t.multiply(n, t.multiply(i, i)))
    assert not isinstance(always(t, equal(t, hard, t.less(j, i)), given), Holds)
