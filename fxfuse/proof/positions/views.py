"""Views, read backwards: where the element at an index lies in a tensor of other sizes and as many elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fxfuse.proof.positions.terms import Term, Terms, Unreadable

_UNFOLLOWED = "a view that cannot be followed"


class Sizes(Protocol):
    """What `reshaped` asks of a reader. A size is an int where it is known, else whatever the reader has for sizes."""

    @property
    def terms(self) -> Terms: ...

    def size(self, value: Any) -> Term:
        """The size as a term."""

    def expression(self, value: Any) -> Any:
        """The size as something that multiplies, and is equal wherever the sizes are."""

    def apart(self, flat: Term, size: Any) -> tuple[Term, Term] | None:
        """x and y of x · size + y, where y is known to be below the size."""


@dataclass(frozen=True)
class Product:
    """A size as a number times what else it is made of: equal for equal sizes, however they were multiplied."""

    number: int
    factors: tuple[Term, ...]

    @staticmethod
    def of(term: Term) -> Product:
        if term.number is not None:
            return Product(int(term.number), ())
        if term.op == "product":
            return Product.of(term.args[0]) * Product.of(term.args[1])
        if term.op == "sum" and term.args[0] == 0 and len(term.args[1]) == 1:
            ((part, factor),) = term.args[1]
            return Product.of(part) * Product(factor, ())
        return Product(1, (term,))

    def __mul__(self, other: Product) -> Product:
        factors = sorted((*self.factors, *other.factors), key=lambda term: term.serial)
        return Product(self.number * other.number, tuple(factors))

    def __rmul__(self, other: int) -> Product:
        return Product(self.number * other, self.factors)

    def over(self, other: Product) -> Product | None:
        """The quotient, where the division leaves nothing over at any size; else None."""
        left = list(self.factors)
        for factor in other.factors:
            if factor not in left:
                return None
            left.remove(factor)
        if other.number == 0 or self.number % other.number:
            return None
        return Product(self.number // other.number, tuple(left))

    def term(self, terms: Terms) -> Term:
        result = terms.number(self.number)
        for factor in self.factors:
            result = terms.multiply(result, factor)
        return result


def reshaped(sizes: Sizes, inner: list[Any], outer: list[Any], index: tuple[Term, ...]) -> tuple[Term, ...]:
    """The index into a tensor of sizes `inner` of what is at `index` once it is viewed as `outer`."""
    t = sizes.terms
    zero = t.number(0)
    places = [(size, i) for size, i in zip(outer, index, strict=True) if not is_one(size)]
    wide = [size for size in inner if not is_one(size)]
    filled: list[Term] = []
    at_outer, at_inner = 0, 0
    while at_inner < len(wide) or at_outer < len(places):
        if at_inner >= len(wide) or at_outer >= len(places):
            raise Unreadable(_UNFOLLOWED)
        if bool(sizes.expression(wide[at_inner]) == sizes.expression(places[at_outer][0])):
            filled.append(places[at_outer][1])
            at_inner, at_outer = at_inner + 1, at_outer + 1
            continue
        group = _group(sizes, wide[at_inner:], [s for s, _ in places[at_outer:]])
        if group is None:
            raise Unreadable(_UNFOLLOWED)
        taken, given = group
        flat = zero
        for size, place in places[at_outer : at_outer + given]:
            flat = t.add(t.multiply(flat, sizes.size(size)), place)
        filled.extend(_split(sizes, flat, wide[at_inner : at_inner + taken]))
        at_inner, at_outer = at_inner + taken, at_outer + given
    rest = iter(filled)
    return tuple(zero if is_one(size) else next(rest) for size in inner)


def _split(sizes: Sizes, flat: Term, into: Sequence[Any]) -> list[Term]:
    """A flat index as indices below each of the sizes."""
    found: list[Term] = []
    for size in reversed(into[1:]):
        if not isinstance(size, int):
            apart = sizes.apart(flat, size)
            if apart is None:
                raise Unreadable("a view that takes an axis of any length apart")
            flat, rest = apart
            found.append(rest)
            continue
        found.append(sizes.terms.remainder(flat, size))
        flat = sizes.terms.divide(flat, size)
    return [flat, *reversed(found)]


def _group(sizes: Sizes, inner: Sequence[Any], outer: Sequence[Any]) -> tuple[int, int] | None:
    """How many leading sizes of each have the same product."""
    products = []
    for several in (inner, outer):
        product: Any = 1
        row = []
        for size in several:
            product = product * sizes.expression(size)
            row.append(product)
        products.append(row)
    for total in range(2, len(inner) + len(outer) + 1):
        for taken in range(1, min(len(inner), total - 1) + 1):
            given = total - taken
            if 1 <= given <= len(outer) and products[0][taken - 1] == products[1][given - 1]:
                return taken, given
    return None


def apart(terms: Terms, limits: Mapping[Term, Term], flat: Term, by: Term) -> tuple[Term, Term] | None:
    """x and y of x · by + y, where y is an index that is below `by`.

    Args:
        limits: the sizes that indices are below.
    """
    if flat.op != "sum" or flat.args[0] != 0:
        return None
    whole: list[Term] = []
    rest: list[Term] = []
    for term, factor in flat.args[1]:
        if factor == 1 and term.op == "product" and by in term.args:
            a, b = term.args
            whole.append(b if a is by else a)
        elif factor == 1 and limits.get(term) is by:
            rest.append(term)
        else:
            return None
    if len(rest) != 1:
        return None
    return terms.add(*whole) if whole else terms.number(0), rest[0]


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1
