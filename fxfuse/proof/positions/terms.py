"""What is computed of positions and sizes, as terms: whole numbers are sums of multiples, the rest is as it is written.

Equal terms are one object, so that "the same computation" is `is`. Integer terms are exact: `//` and `%` round down, as
Python's do. A step whose meaning is not known here (cos, a cast to bfloat16) is an `apply`: of equal arguments it gives
equal results, and nothing else is known of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from fxfuse.proof.positions.term import (
    EVERYTHING,
    POSITIONS,
    Bounds,
    Kind,
    Term,
    Unreadable,
    floor,
    reach,
    times,
    value_of,
)


class Terms:
    """Makes terms, each once."""

    def __init__(self) -> None:
        self._made: dict[Any, Term] = {}
        self.true = self.number(True)
        self.false = self.number(False)

    def _make(self, op: str, args: tuple[Any, ...], kind: Kind, bounds: Bounds = EVERYTHING) -> Term:
        key = (op, args, kind, bounds if op == "variable" else None)
        found = self._made.get(key)
        if found is None:
            found = Term(op, args, kind, bounds, len(self._made))
            own = frozenset([args[0]]) if op == "variable" else frozenset([args[0]]) if op == "given" else frozenset()
            found.leaves = own.union(*(c.leaves for c in found.children))
            found.reach = reach(found)
            self._made[key] = found
        return found

    def number(self, value: float | int | bool) -> Term:
        """A constant. Floats that hold a whole number are other terms than the integer; see `whole`."""
        kind: Kind = "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "real"
        if value != value:
            return self.apply("nan", (), "real")
        return self._make("number", (value, type(value)), kind, (float(value), float(value)))

    def variable(self, name: str, low: float = 0, high: float = math.inf) -> Term:
        """A whole number that is free between these bounds: a size, or an index. With other bounds it is another."""
        return self._make("variable", (name,), "int", (low, high))

    def apply(self, name: str, args: tuple[Any, ...], kind: Kind) -> Term:
        """A step of which nothing is known but that equal arguments give equal results."""
        return self._make("apply", (name, *args), kind)

    def given(self, name: str, index: tuple[Term, ...], kind: Kind) -> Term:
        """An element of an input, or of a table."""
        return self._make("given", (name, *index), kind)

    # ---- whole numbers

    def linear(self, term: Term) -> tuple[int, dict[Term, int]]:
        """A whole number as a constant, and how often it has each of its parts."""
        if term.op == "number":
            return int(term.args[0]), {}
        if term.op == "sum":
            return term.args[0], dict(term.args[1])
        return 0, {term: 1}

    def _sum(self, constant: int, parts: dict[Term, int]) -> Term:
        kept = {t: c for t, c in parts.items() if c}
        if not kept:
            return self.number(constant)
        if constant == 0 and len(kept) == 1:
            ((term, factor),) = kept.items()
            if factor == 1:
                return term
        low = high = float(constant)
        for term, factor in kept.items():
            ends = sorted(times(factor, e) for e in term.bounds)
            low, high = low + ends[0], high + ends[1]
        ordered = tuple(sorted(kept.items(), key=lambda item: item[0].serial))
        return self._make("sum", (constant, ordered), "int", (low, high))

    def add(self, *terms: Term) -> Term:
        constant, parts = 0, dict[Term, int]()
        for term in terms:
            own, more = self.linear(self.as_int(term))
            constant += own
            for part, factor in more.items():
                parts[part] = parts.get(part, 0) + factor
        return self._sum(constant, parts)

    def scale(self, term: Term, by: int) -> Term:
        constant, parts = self.linear(self.as_int(term))
        return self._sum(constant * by, {t: c * by for t, c in parts.items()})

    def subtract(self, first: Term, second: Term) -> Term:
        return self.add(first, self.scale(second, -1))

    def multiply(self, first: Term, second: Term) -> Term:
        first, second = self.as_int(first), self.as_int(second)
        if first.number is not None:
            return self.scale(second, int(first.number))
        if second.number is not None:
            return self.scale(first, int(second.number))
        for one, other in ((first, second), (second, first)):
            if one.op == "choose":  # a triangle times what it keeps
                condition, x, y = one.args
                if x.number in (0, 1) and y.number in (0, 1):
                    return self.choose(condition, self.multiply(x, other), self.multiply(y, other))
        a, b = sorted((first, second), key=_serial)
        ends = [times(p, q) for p in a.bounds for q in b.bounds]
        return self._make("product", (a, b), "int", (min(ends), max(ends)))

    def divide(self, term: Term, by: int) -> Term:
        """Rounded down; `by` is positive."""
        if by == 1:
            return self.as_int(term)
        constant, parts = self.linear(self.as_int(term))
        outside = {t: c // by for t, c in parts.items() if c % by == 0}
        rest = self._sum(constant % by, {t: c for t, c in parts.items() if c % by})
        whole = self._sum(constant // by, outside)
        low, high = rest.bounds
        if low >= 0 and high < by:
            return whole
        if rest.number is not None:
            return self.add(whole, self.number(int(rest.number) // by))
        bounds = (floor(low / by), floor(high / by))
        return self.add(whole, self._make("quotient", (rest, by), "int", bounds))

    def remainder(self, term: Term, by: int) -> Term:
        """The rest of `divide`."""
        constant, parts = self.linear(self.as_int(term))
        rest = self._sum(constant % by, {t: c % by for t, c in parts.items() if c % by})
        if rest.number is not None:
            return self.number(int(rest.number) % by)
        low, high = rest.bounds
        if low >= 0 and high < by:
            return rest
        return self._make("remainder", (rest, by), "int", (0, by - 1))

    def minimum(self, first: Term, second: Term) -> Term:
        return self.choose(self.at_most(first, second), first, second)

    def maximum(self, first: Term, second: Term) -> Term:
        return self.choose(self.at_most(first, second), second, first)

    def absolute(self, term: Term) -> Term:
        return self.choose(self.at_most(self.number(0), term), term, self.negative(term))

    def negative(self, term: Term) -> Term:
        if term.kind == "real":
            return self._map_numbers(term, lambda v: -v, "neg")
        return self.scale(term, -1)

    def as_int(self, term: Term) -> Term:
        """Booleans as 0 and 1."""
        if term.kind == "bool":
            return self.choose(term, self.number(1), self.number(0))
        return term

    def as_bool(self, term: Term) -> Term:
        return term if term.kind == "bool" else self.opposite(self.equal(term, self.number(0)))

    def as_real(self, term: Term, to: type = float) -> Term:
        """Constants as floats; other whole numbers stay what they are, for a float holds them exactly."""
        if term.op == "number":
            return self.number(float(term.args[0]))
        if term.kind == "bool" or term.op == "choose":
            if term.op == "choose":
                condition, x, y = term.args
                return self.choose(condition, self.as_real(x), self.as_real(y))
            return self.choose(term, self.number(1.0), self.number(0.0))
        return term

    def _map_numbers(self, term: Term, change: Callable[[float], float], name: str) -> Term:
        if term.op == "number":
            return self.number(change(float(term.args[0])))
        if term.op == "choose":
            condition, x, y = term.args
            return self.choose(condition, self._map_numbers(x, change, name), self._map_numbers(y, change, name))
        if term.op == "apply" and term.args[0] == name:
            inner: Term = term.args[1]
            return inner
        return self.apply(name, (term,), "real")

    # ---- comparisons and choices

    def at_most(self, first: Term, second: Term) -> Term:
        """first <= second"""
        if first.op == "choose" and second.op == "number":
            condition, x, y = first.args
            return self.choose(condition, self.at_most(x, second), self.at_most(y, second))
        if second.op == "choose" and first.op == "number":
            condition, x, y = second.args
            return self.choose(condition, self.at_most(first, x), self.at_most(first, y))
        if first.op == second.op == "number":
            return self.number(bool(first.args[0] <= second.args[0]))
        if "real" in (first.kind, second.kind):
            return self._real_comparison("at_most", first, second)
        difference = self.subtract(second, first)
        low, high = difference.bounds
        if low >= 0:
            return self.true
        if high < 0:
            return self.false
        return self._make("natural", (difference,), "bool")

    def less(self, first: Term, second: Term) -> Term:
        """first < second"""
        return self.opposite(self.at_most(second, first))

    def equal(self, first: Term, second: Term) -> Term:
        if first is second and (first.kind != "real" or first.op == "number"):  # what is not a number is no equal
            return self.true
        if first.op == "choose" and second.op == "number":
            condition, x, y = first.args
            return self.choose(condition, self.equal(x, second), self.equal(y, second))
        if second.op == "choose" and first.op == "number":
            return self.equal(second, first)
        if first.op == second.op == "number":
            return self.number(bool(first.args[0] == second.args[0]))
        if first.kind == second.kind == "bool":
            return self.choose(first, second, self.opposite(second))
        if "real" in (first.kind, second.kind):
            return self._real_comparison("equal", *sorted((first, second), key=_serial))
        difference = self.subtract(first, second)
        if difference.number is not None:
            return self.number(difference.number == 0)
        low, high = difference.bounds
        if low > 0 or high < 0:
            return self.false
        opposite = self.negative(difference)
        return self._make("zero", (min(difference, opposite, key=_serial),), "bool")

    def _real_comparison(self, name: str, first: Term, second: Term) -> Term:
        """Of a whole number with a float: exactly, where the float is a constant."""
        for whole, other, flip in ((first, second, False), (second, first, True)):
            value = other.number
            if whole.kind == "int" and value is not None:
                if math.isinf(value):
                    known = (value > 0) != flip if name == "at_most" else False
                    return self.number(known)
                if name == "equal":
                    return self.equal(whole, self.number(int(value))) if value == int(value) else self.false
                if flip:
                    return self.at_most(self.number(math.ceil(value)), whole)
                return self.at_most(whole, self.number(math.floor(value)))
        if first.kind != "real" and second.kind != "real":
            return self.at_most(first, second) if name == "at_most" else self.equal(first, second)
        return self.apply(name, (first, second), "bool")

    def opposite(self, condition: Term) -> Term:
        if condition.op == "number":
            return self.number(not condition.args[0])
        if condition.op == "not":
            found: Term = condition.args[0]
            return found
        if condition.op == "natural":  # not (d >= 0) is -d - 1 >= 0
            (difference,) = condition.args
            return self._make("natural", (self.subtract(self.number(-1), difference),), "bool")
        return self._make("not", (condition,), "bool")

    def every(self, conditions: Iterable[Term]) -> Term:
        kept: dict[Term, None] = {}
        for condition in conditions:
            for part in condition.args if condition.op == "and" else (condition,):
                if part is self.false or self.opposite(part) in kept:
                    return self.false
                if part is not self.true:
                    kept[part] = None
        if len(kept) < 2:
            return next(iter(kept), self.true)
        return self._make("and", tuple(sorted(kept, key=_serial)), "bool")

    def any(self, conditions: Iterable[Term]) -> Term:
        return self.opposite(self.every([self.opposite(c) for c in conditions]))

    def choose(self, condition: Term, first: Term, second: Term) -> Term:
        """first where the condition holds, else second."""
        if condition is self.true or first is second:
            return first
        if condition is self.false:
            return second
        if condition.op == "not":
            return self.choose(condition.args[0], second, first)
        if first.kind == second.kind == "bool":
            if second is self.false:
                return self.every([condition, first])
            if first is self.true:
                return self.any([condition, second])
            if first is self.false:
                return self.every([self.opposite(condition), second])
            if second is self.true:
                return self.any([self.opposite(condition), first])
        kinds = {first.kind, second.kind}
        kind: Kind = "real" if "real" in kinds else "int" if "int" in kinds else "bool"
        if kind == "int":
            first, second = self.as_int(first), self.as_int(second)
        bounds = (min(first.bounds[0], second.bounds[0]), max(first.bounds[1], second.bounds[1]))
        return self._make("choose", (condition, first, second), kind, bounds)


def _serial(term: Term) -> int:
    """The order in which terms were made, so that a sum is always written the same way round."""
    return term.serial


__all__ = ["EVERYTHING", "POSITIONS", "Bounds", "Kind", "Term", "Terms", "Unreadable", "value_of"]
