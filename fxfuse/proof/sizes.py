"""Small concrete sizes for the symbols of a program: what a region is evaluated at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from fxfuse.proof.derived import long_enough, shortest

_LADDERS = ((3, 5, 7, 4, 6, 9, 8, 10), (2, 7, 3, 5, 4, 6, 9, 8), (1, 1, 1, 1, 1, 1, 1, 1), (16, 32, 64, 48, 80))
_LEAST = 3, 4, 1, 3
"""How long, in each profile, what is computed of a symbol is to be."""
PROFILES = len(_LADDERS)
"""Profiles 0 and 1 give every symbol a size of its own, 2 the smallest it may have (1 hides broadcasts), 3 multiples
of 16 for programs whose sizes must divide."""


class Sizes:
    """Concrete sizes by symbol, chosen within the program's range constraints, in order of first use.

    Args:
        ranges: value range of each symbol, `ExportedProgram.range_constraints`.
        profile: which ladder of small sizes to take, below `PROFILES`.
        stretch: up to this, symbols that have an upper bound take it instead (a sequence as long as its table).
        preset: sizes wanted for some symbols, as far as their range admits them.
        equal_sizes: pairs of sizes, the first of which takes the value of the second.
        multiples: what a symbol has to be a multiple of.
        derived: by symbol, sizes that are computed of it, which should not be 1 where it is not the smallest.
    """

    def __init__(
        self,
        ranges: dict[Any, Any],
        profile: int = 0,
        *,
        stretch: int = 0,
        preset: dict[Any, int] | None = None,
        equal_sizes: Iterable[tuple[Any, Any]] = (),
        multiples: Mapping[Any, int] | None = None,
        derived: Mapping[Any, tuple[Any, ...]] | None = None,
    ) -> None:
        self._ranges = ranges
        self._multiples = multiples or {}
        self._derived = derived or {}
        self._profile = profile
        self._stretch = stretch
        self._preset = preset or {}
        self._equal: dict[Any, tuple[Any, Any]] = {}
        for a, b in equal_sizes:
            if isinstance(a, torch.SymInt):
                other = b.node.expr.free_symbols if isinstance(b, torch.SymInt) else set()
                terms = [t for t in a.node.expr.as_ordered_terms() if t.is_Symbol and t not in other]
                if len(terms) == 1 and terms[0] not in (rest := a.node.expr - terms[0]).free_symbols:
                    self._equal[terms[0]] = b, rest
        self._values: dict[Any, int] = {}
        self._known: dict[Any, Any] = {}

    def __call__(self, size: Any) -> Any:
        """The concrete value of an int, float, bool or their symbolic kinds."""
        if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return size
        expr = size.node.expr
        if (known := self._known.get(expr)) is not None:
            return known
        value = self._value(expr)
        kind = int if isinstance(size, torch.SymInt) else float if isinstance(size, torch.SymFloat) else bool
        self._known[expr] = kind(value)
        return self._known[expr]

    def _value(self, expr: Any) -> Any:
        """The number that a sympy expression is."""
        for symbol in sorted(expr.free_symbols, key=str):
            if symbol not in self._values:
                if symbol in self._equal:
                    other, rest = self._equal[symbol]
                    self._values[symbol] = self(other) - int(self._value(rest))
                else:
                    self._values[symbol] = self._choose(symbol)
        return expr.xreplace({s: self._values[s] for s in expr.free_symbols})

    def of_symbol(self, symbol: Any) -> int:
        """The size that one symbol stands for."""
        return int(self._value(symbol))

    @property
    def chosen(self) -> dict[Any, int]:
        """The symbols that were asked for, and what they are."""
        return self._values

    def shape(self, node: Node) -> tuple[int, ...]:
        return tuple(self(d) for d in node.meta["val"].shape)

    def _choose(self, symbol: Any) -> int:
        unit = self._multiples.get(symbol, 1)
        size = self._chosen(symbol) if unit == 1 else unit * max(1, self._chosen(symbol, unit))
        derived = self._derived.get(symbol, ())
        least = _LEAST[self._profile]
        if symbol in self._preset or not derived or long_enough(symbol, size, derived, least):
            return size
        allowed = self._ranges.get(symbol)
        high = None if allowed is None else _bound(allowed.upper, None)
        longer = next(filter(None, (shortest(symbol, size, high, derived, n) for n in range(least, 0, -1))), None)
        return size if longer is None else -(-longer // unit) * unit

    def _chosen(self, symbol: Any, unit: int = 1) -> int:
        """The size, in units of what it has to be a multiple of."""
        allowed = self._ranges.get(symbol)
        low, high = (0, None) if allowed is None else (_bound(allowed.lower, 0) or 0, _bound(allowed.upper, None))
        low, high = -(-low // unit), high if high is None else high // unit
        if symbol in self._preset:
            wanted = -(-self._preset[symbol] // unit)
            low = 1 if low == 2 else low  # torch writes 2 where it did not see 1; the program runs at 1 too
            return max(low, wanted if high is None else min(high, wanted))
        if self._stretch and high is not None:
            return max(low, min(high, self._stretch // unit))
        ladder = _LADDERS[self._profile]
        high = max(ladder) if high is None else high
        taken = set(self._values.values())
        for size in ladder:
            if low <= size <= high and (size not in taken or size == 1):
                return size
        return max(min(ladder[0], high), low, 1)


def _bound(value: Any, default: int | None) -> int | None:
    try:
        bound = int(value)
    except (TypeError, ValueError, OverflowError, AttributeError):
        return default
    return bound if abs(bound) < 2**31 else default


def ties_of(program: ExportedProgram) -> tuple[tuple[Any, Any], ...]:
    """Symbols that are one size in the sample: pairs of sizes, each with the first of its size.

    torch.export gives every dimension a symbol of its own, and equates those only that an operator compares.
    """
    first: dict[int, Any] = {}
    found: dict[Any, tuple[Any, Any]] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        shape: tuple[Any, ...] = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
        for size in shape:
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and size.node.hint is not None:
                other = first.setdefault(int(size.node.hint), size)
                if other.node.expr != size.node.expr:
                    found[size.node.expr] = size, other
    return tuple(found.values())


def places_of(program: ExportedProgram) -> dict[Any, str]:
    """Where each symbol stands first: ``"memory.shape[0]"``."""
    found: dict[Any, str] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        shape: tuple[Any, ...] = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
        for axis, size in enumerate(shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                found.setdefault(size.node.expr, f"{node.name}.shape[{axis}]")
    return found


def ranges_of(program: ExportedProgram) -> dict[Any, Any]:
    """The value range of every symbol in the program."""
    return dict(program.range_constraints)
