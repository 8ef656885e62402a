"""One term, which is made by `fxfuse.proof.positions.terms.Terms` alone, and what can be told of it by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

Kind = Literal["int", "bool", "real"]
Bounds = tuple[float, float]
EVERYTHING: Bounds = (-math.inf, math.inf)
POSITIONS = 2**20
"""Positions and sizes are taken to stay below this. A step counts as exact where its type holds what it computes of
them."""


class Unreadable(Exception):
    """The element cannot be said in terms; the message says which step cannot."""


class Term:
    """One term; made by a `Terms` only. `op` says what `args` are."""

    __slots__ = ("args", "bounds", "kind", "leaves", "op", "reach", "serial")

    def __init__(self, op: str, args: tuple[Any, ...], kind: Kind, bounds: Bounds, serial: int) -> None:
        self.serial = serial
        self.op = op
        self.args = args
        self.kind = kind
        self.bounds = bounds
        self.leaves: frozenset[str] = frozenset()
        self.reach: Bounds = EVERYTHING
        """The bounds of a whole number, for positions and sizes up to `POSITIONS`."""

    @property
    def number(self) -> Any:
        """The value of a constant; None where it is none."""
        return self.args[0] if self.op == "number" else None

    @property
    def children(self) -> list[Term]:
        if self.op == "sum":
            return [term for term, _ in self.args[1]]
        return [a for a in self.args if isinstance(a, Term)]

    def walk(self) -> Iterator[Term]:
        """It and everything that it is made of, each once."""
        seen: set[int] = set()
        stack = [self]
        while stack:
            term = stack.pop()
            if id(term) not in seen:
                seen.add(id(term))
                yield term
                stack.extend(term.children)

    def __repr__(self) -> str:
        if self.op in ("number", "variable"):
            return str(self.args[0])
        if self.op == "sum":
            parts = [f"{c}·{t!r}" if c != 1 else repr(t) for t, c in self.args[1]]
            return "(" + " + ".join(parts + ([str(self.args[0])] if self.args[0] else [])) + ")"
        return f"{self.op}({', '.join(map(repr, self.args))})"


def reach(term: Term) -> Bounds:
    """The bounds of a whole number, given that variables and unknown parts lie within `POSITIONS`."""
    low, high = term.bounds
    if term.kind != "int":
        return (0, 1) if term.kind == "bool" else (low, high)
    if term.op == "sum":
        parts = [sorted(times(factor, e) for e in part.reach) for part, factor in term.args[1]]
        own = term.args[0] + sum(e[0] for e in parts), term.args[0] + sum(e[1] for e in parts)
    elif term.op == "product":
        products = [times(p, q) for p in term.args[0].reach for q in term.args[1].reach]
        own = min(products), max(products)
    elif term.op == "quotient":
        ends = term.args[0].reach
        own = floor(ends[0] / term.args[1]), floor(ends[1] / term.args[1])
    elif term.op == "choose":
        x, y = term.args[1].reach, term.args[2].reach
        own = min(x[0], y[0]), max(x[1], y[1])
    else:
        own = (-POSITIONS, POSITIONS) if term.op != "number" else (low, high)
    return max(low, own[0]), min(high, own[1])


def times(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b


def floor(value: float) -> float:
    return value if math.isinf(value) else math.floor(value)


def value_of(term: Term, values: dict[str, int]) -> Any:
    """What the term is for these values of its variables; it has nothing else to depend on."""
    a = term.args
    if term.op == "number":
        return a[0]
    if term.op == "variable":
        return values[a[0]]
    if term.op == "sum":
        return a[0] + sum(c * value_of(t, values) for t, c in a[1])
    if term.op == "choose":
        return value_of(a[1] if value_of(a[0], values) else a[2], values)
    parts = [value_of(p, values) if isinstance(p, Term) else p for p in a]
    computed: dict[str, Callable[[], Any]] = {
        "product": lambda: parts[0] * parts[1],
        "quotient": lambda: parts[0] // parts[1],
        "remainder": lambda: parts[0] % parts[1],
        "natural": lambda: parts[0] >= 0,
        "zero": lambda: parts[0] == 0,
        "not": lambda: not parts[0],
        "and": lambda: all(parts),
    }
    return computed[term.op]()
