"""What operators do to terms, for both readers: that of FX graphs and that of ONNX graphs.

A function here is given the operands as terms and gives the result as one, or None where the result is not exact.

Whole numbers are exact in floats too, as far as these hold them. The type that is given is that of the operator's
result, in which it computes; what it makes of whole numbers is up to who reads, and is `kept` unless said.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch

from fxfuse.proof.positions.terms import Term, Terms, Unreadable

_EXACT = 2**53
LEAVES = 16
"""A term that chooses between at most this many constants is computed with for each of them."""
_WRAPS = {torch.int8: (8, True), torch.uint8: (8, False), torch.int16: (16, True)}
_COUNTS_TO = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}

Keep = Callable[[Terms, Term, torch.dtype], "Term | None"]
"""What becomes of a whole number in a type (narrow integers wrap); None where the type does not hold it exactly."""


def float_number(terms: Terms, value: float) -> Term:
    """A float constant. One that is whole, as 2.0, becomes the whole number, so that both are one term."""
    if math.isfinite(value) and value == int(value) and abs(value) < _EXACT:
        return terms.number(int(value))
    return terms.number(float(value))


def rounded_number(terms: Terms, value: float, dtype: torch.dtype) -> Term:
    """A constant as a type of floats holds it."""
    return float_number(terms, float(torch.tensor(value, dtype=torch.float64).to(dtype)))


# ---- types


def holds(term: Term, dtype: torch.dtype) -> bool:
    """Does the type hold this whole number exactly, for all positions?"""
    low, high = term.reach
    if dtype.is_floating_point:
        limit = 1 << _COUNTS_TO.get(dtype, 0)
        return -limit <= low and high <= limit
    return torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max


def kept(terms: Terms, term: Term, dtype: torch.dtype) -> Term | None:
    """The result of whole arithmetic in this type: narrow integers wrap; None where it may not be exact."""
    if dtype in _WRAPS:
        return narrowed(terms, term, torch.int64, dtype)
    return term if holds(term, dtype) else None


def narrowed(t: Terms, term: Term, source: torch.dtype, target: torch.dtype) -> Term:
    """A cast of what is read.

    Whole numbers wrap in int8, uint8 and int16, and are rounded by floats that do not hold them.
    """
    if source == target:
        return term
    if target == torch.bool:
        return t.as_bool(term)
    if target.is_complex or source.is_complex:
        raise Unreadable("a complex number")
    if target.is_floating_point:
        term = t.as_int(term)
        if term.number is not None:
            return rounded_number(t, term.number, target)
        if term.op == "apply" and term.args[0] == "nan":
            return term
        if term.op == "apply" and term.args[0] == "neg":  # rounding is the same on either side of 0
            return t.negative(narrowed(t, term.args[1], source, target))
        wider = target in (torch.float32, torch.float64) and (
            not source.is_floating_point or torch.finfo(target).bits >= torch.finfo(source).bits
        )
        if holds(term, target) if term.kind == "int" else wider:
            return term
        if term.op == "choose":
            condition, x, y = term.args
            return t.choose(condition, narrowed(t, x, source, target), narrowed(t, y, source, target))
        return t.apply(f"to {target}", (term,), "real")
    if term.kind == "real":
        if term.op == "choose":
            condition, x, y = term.args
            return t.choose(condition, narrowed(t, x, source, target), narrowed(t, y, source, target))
        if term.number is not None and math.isfinite(term.number) and holds(t.number(int(term.number)), target):
            return t.number(int(term.number))
        return t.apply(f"to {target}", (term,), "int")
    term = t.as_int(term)
    if target in _WRAPS:
        bits, signed = _WRAPS[target]
        half = 2 ** (bits - 1) if signed else 0
        return t.subtract(t.remainder(t.add(term, t.number(half)), 2**bits), t.number(half))
    return term if holds(term, target) else t.apply(f"to {target}", (term,), "int")


# ---- constants


def numbers(term: Term) -> int | None:
    """Between how many constants a term chooses; None where it holds anything but constants and choices."""
    if term.op == "number":
        return 1
    if term.op == "choose":
        x, y = numbers(term.args[1]), numbers(term.args[2])
        return None if x is None or y is None else x + y
    return None


def both(terms: Terms, x: Term, y: Term, combine: Callable[[Any, Any], Term]) -> Term | None:
    """`combine` of constants, through the choices that either of the two makes."""
    counts = numbers(x), numbers(y)
    if counts[0] is None or counts[1] is None or counts[0] * counts[1] > LEAVES:
        return None
    for one, other, left in ((x, y, True), (y, x, False)):
        if one.op == "choose":
            condition, first, second = one.args
            pairs = [(part, other) if left else (other, part) for part in (first, second)]
            a, b = (both(terms, p, q, combine) for p, q in pairs)
            return None if a is None or b is None else terms.choose(condition, a, b)
    return combine(x.args[0], y.args[0])


def folded(
    terms: Terms,
    dtype: torch.dtype,
    x: Term,
    y: Term,
    function: Callable[[Any, Any], Any],
    *,
    divides: bool = False,
) -> Term | None:
    """Constants computed as PyTorch computes them, in this type."""

    def combine(a: Any, b: Any) -> Term:
        if divides and b == 0:
            raise Unreadable("a quotient by zero, which has a sign")
        first, second = (torch.tensor(float(v), dtype=torch.float64).to(dtype) for v in (a, b))
        value = function(first, second).item()
        return float_number(terms, value) if value == value else terms.apply("nan", (), "real")

    return both(terms, x, y, combine)


# ---- numbers


def plus(terms: Terms, dtype: torch.dtype, x: Term, y: Term, sign: int = 1, keep: Keep = kept) -> Term | None:
    """x + y, or x - y for a sign of -1."""
    if dtype.is_floating_point and dtype not in (torch.float32, torch.float64):
        return None

    def function(a: Any, b: Any) -> Any:
        return a + b if sign > 0 else a - b

    if "choose" in (x.op, y.op):
        found = folded(terms, dtype, x, y, function)
        if found is not None:
            return found
    if x.kind == y.kind == "int":
        return keep(terms, terms.add(x, y) if sign > 0 else terms.subtract(x, y), dtype)
    if y.number == 0:
        return x
    if x.number == 0 and sign > 0:
        return y
    return folded(terms, dtype, x, y, function)


def times(terms: Terms, dtype: torch.dtype, x: Term, y: Term, keep: Keep = kept) -> Term:
    """A product of two elements, whatever call makes it."""
    t = terms
    if dtype == torch.bool:
        return t.every([t.as_bool(x), t.as_bool(y)])
    x, y = t.as_int(x), t.as_int(y)
    for one, other in ((x, y), (y, x)):
        if one.op == "apply" and one.args[0] == "neg":
            return t.negative(times(t, dtype, one.args[1], other, keep))
        if one.number == 1:
            return other
        if one.number == -1 and other.kind == "real":
            return t.negative(other)
    floating = dtype.is_floating_point
    if floating and (found := folded(t, dtype, x, y, lambda a, b: a * b)) is not None:
        return found
    if x.kind == y.kind == "int":
        small = any(v.number is not None and abs(v.number) <= 16 for v in (x, y))
        if not floating or small or _is_gate(x) or _is_gate(y):  # no float holds every product of positions
            exact = keep(t, t.multiply(x, y), dtype)
            if exact is not None:
                return exact
    whole = not floating and not dtype.is_complex
    ordered = tuple(sorted((x, y), key=lambda v: v.serial))
    return t.apply(f"product in {dtype}", ordered, "int" if whole else "real")


def _is_gate(term: Term) -> bool:
    return term.op == "choose" and {term.args[1].number, term.args[2].number} == {0, 1}


def over(
    terms: Terms, dtype: torch.dtype, x: Term, y: Term, rounded: Literal["floor", "trunc"] | None = None
) -> Term | None:
    """x / y."""
    if rounded is None:
        return x if y.number == 1 else folded(terms, dtype, x, y, lambda a, b: a / b, divides=True)
    down = rounded == "floor" or x.bounds[0] >= 0
    exact = _whole_by(x, y) and dtype not in (torch.float16, torch.bfloat16)
    return terms.divide(x, int(y.number)) if exact and down else None


def rest(terms: Terms, x: Term, y: Term, *, truncated: bool = False) -> Term | None:
    """x % y, of the sign of y; or of that of x, if it is truncated."""
    if not _whole_by(x, y) or (truncated and x.bounds[0] < 0):
        return None
    return terms.remainder(x, int(y.number))


def _whole_by(x: Term, y: Term) -> bool:
    return x.kind == "int" and isinstance(y.number, int) and y.number > 0


def shifted(terms: Terms, x: Term, by: Term, *, left: bool) -> Term | None:
    """A wide whole number with its bits shifted."""
    if not isinstance(by.number, int) or not 0 <= by.number < 62 or x.kind != "int":
        return None
    factor = 2**by.number
    return terms.scale(x, factor) if left else terms.divide(x, factor)


def masked(terms: Terms, x: Term, y: Term) -> Term | None:
    """x & (2ⁿ - 1) is a remainder."""
    for number, other in ((x, y), (y, x)):
        mask = number.number
        if isinstance(mask, int) and mask > 0 and (mask + 1) & mask == 0 and other.kind == "int":
            return terms.remainder(other, mask + 1)
    return None


def extreme(terms: Terms, x: Term, y: Term, *, largest: bool) -> Term | None:
    x, y = terms.as_int(x), terms.as_int(y)
    if "real" in (x.kind, y.kind):
        return None
    return terms.maximum(x, y) if largest else terms.minimum(x, y)


def absolute(terms: Terms, x: Term) -> Term | None:
    x = terms.as_int(x)
    return terms.absolute(x) if x.kind == "int" else None


# ---- comparisons and choices

Comparison = Literal["le", "lt", "ge", "gt", "eq", "ne"]


def compared(terms: Terms, name: Comparison, x: Term, y: Term) -> Term:
    t = terms
    x, y = t.as_int(x), t.as_int(y)
    return {
        "le": lambda: t.at_most(x, y),
        "lt": lambda: t.less(x, y),
        "ge": lambda: t.at_most(y, x),
        "gt": lambda: t.less(y, x),
        "eq": lambda: t.equal(x, y),
        "ne": lambda: t.opposite(t.equal(x, y)),
    }[name]()


def chosen(terms: Terms, dtype: torch.dtype, condition: Term, x: Term, y: Term) -> Term:
    """x where the condition holds, else y."""
    return terms.choose(terms.as_bool(condition), like(terms, dtype, x), like(terms, dtype, y))


def like(terms: Terms, dtype: torch.dtype, term: Term) -> Term:
    """One branch of a choice, in the type of the choice's result."""
    return terms.as_bool(term) if dtype == torch.bool else terms.as_int(term)
