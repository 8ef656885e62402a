"""Breaks of sizes: operators that do not act alike at every size, and whether both their sides were met.

Elementwise operators, reductions and products treat a long axis as they treat a short one. `min(S, 64)`, `S // 64`,
and a slice up to a number that is written, do not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sympy import preorder_traversal
from torch.fx import Node

from fxfuse.graph.region import Region
from fxfuse.graph.source import place_of
from fxfuse.graph.view import argument, fake, is_size, op_name, tensor
from fxfuse.proof.evaluate import Evaluator
from fxfuse.proof.multiples import divided, exact_quotient
from fxfuse.proof.positions.decide import Fails, Holds, always
from fxfuse.proof.positions.terms import Term, value_of

if TYPE_CHECKING:
    from fxfuse.recognise.probe import Probe

_UNIFORM = frozenset(
    ["Add", "Mul", "Pow", "Symbol", "Integer", "Rational", "Half", "One", "Zero", "NegativeOne", "Float"]
)
_QUOTIENTS = frozenset(["ToFloat", "IntTrueDiv", "FloatTrueDiv", "CleanDiv"])
_STEPS = frozenset(["FloorDiv", "Mod", "PythonMod"])


@dataclass
class _Side:
    """One side of a bound."""

    name: str
    holds: Term
    met: bool = False
    unreachable: bool = False


class Extents:
    """The breaks of sizes within one region."""

    def __init__(self, region: Region, ask: Probe) -> None:
        self._ask = ask
        self._sides: dict[tuple[str, Term], _Side] = {}
        self._unknown: str | None = None
        self._symbols: dict[str, Any] = {}
        dims: list[Any] = [d for n in region.inputs for d in fake(n).shape]
        self._given = {d.node.expr for d in dims if isinstance(d, torch.SymInt)}
        for node in region.nodes:
            self._look(node)

    @property
    def name(self) -> str:
        """What the sizes are bounded by."""
        return next((s.name for s in self._sides.values() if not s.met), "sizes")

    def note(self, evaluator: Evaluator) -> None:
        """Note on which side of each bound the sizes of this draw lie."""
        if not self._sides:
            return
        values = {name: evaluator.sizes.of_symbol(symbol) for name, symbol in self._symbols.items()}
        for side in self._sides.values():
            side.met = side.met or bool(value_of(side.holds, values))

    def wanted(self) -> Iterator[tuple[tuple[Any, int], ...]]:
        """Sizes to draw at, so that the sides that no draw has met yet are met."""
        for side in list(self._sides.values()):
            if side.met or side.unreachable:
                continue
            t = self._ask.reader.terms
            for least in (2, 1):  # an axis of 0 computes nothing, and one of 1 shows little: 2 is tried first
                sizes = [t.at_most(t.number(least), self._ask.reader.symbolic(s)) for s in self._symbols.values()]
                verdict = always(t, t.opposite(side.holds), sizes, smallest=sorted(self._symbols))
                if isinstance(verdict, Fails):
                    break
            side.unreachable = isinstance(verdict, Holds)
            if isinstance(verdict, Fails):
                yield tuple((self._symbols[n], v) for n, v in verdict.values.items() if n in self._symbols)

    def refused(self) -> str | None:
        """Why nothing is proven, where a side was not met."""
        if self._unknown is not None:
            return f"its sizes matter in a way that is not followed: {self._unknown}"
        missing = next((s for s in self._sides.values() if not s.met and not s.unreachable), None)
        return None if missing is None else f"could not be compared on both sides of {missing.name}"

    def _look(self, node: Node) -> None:
        sizes = [n for n in node.all_input_nodes if is_size(n)]
        for size in sizes:
            self._take(size.meta["val"], size)
        value = tensor(node)
        for dim in value.shape if value is not None else ():
            self._take(dim, node)
        if op_name(node) in ("slice", "narrow", "slice_scatter"):
            self._slice(node)

    def _take(self, value: Any, node: Node) -> None:
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            expr = value.node.expr
            exact = divided(expr, self._ask.multiples)
            self._walk(expr if any(type(e).__name__ in _STEPS for e in preorder_traversal(exact)) else exact, node)

    def _walk(self, expr: Any, node: Node) -> None:
        if expr in self._given or expr.is_Symbol or expr.is_number:
            return
        kind = type(expr).__name__
        if kind in ("Max", "Min"):
            parts = [self._term(a) for a in expr.args]
            for place, first in enumerate(parts):
                for second in parts[place + 1 :]:
                    self._two_sides(kind, first, second, node)
        elif kind in _STEPS:
            divisor = expr.args[1]
            if kind == "FloorDiv" and (quotient := exact_quotient(*expr.args)) is not None:
                self._walk(quotient, node)
                return
            if not divisor.is_Integer:
                self._unknown = self._unknown or f"{kind.lower()}@{place_of(node)}"
                return
            t = self._ask.reader.terms
            term, by = self._term(expr.args[0]), int(divisor)
            self._two_sides(f"{kind} by {by}", term, t.number(by), node)
            self._side(f"{kind} by {by}", t.opposite(t.equal(t.remainder(term, by), t.number(0))), node)
        elif kind not in _UNIFORM and kind not in _QUOTIENTS:
            self._unknown = self._unknown or f"{kind.lower()}@{place_of(node)}"
            return
        for part in expr.args:
            self._walk(part, node)

    def _slice(self, node: Node) -> None:
        """A slice up to a written number, of an axis of any length: the axis may be shorter or longer than that."""
        source = node.args[0]
        assert isinstance(source, Node)
        axis = int(argument(node, "dim") or 0) % fake(source).dim()
        size: Any = fake(source).shape[axis]
        if not isinstance(size, torch.SymInt):
            return
        t = self._ask.reader.terms
        for bound in (argument(node, "start"), argument(node, "end")):
            if isinstance(bound, int) and bound != 0 and abs(bound) < sys.maxsize // 2:
                self._two_sides("slice", self._term(size.node.expr), t.number(abs(bound)), node)

    def _term(self, expr: Any) -> Term:
        for symbol in expr.free_symbols:
            self._symbols[str(symbol)] = symbol
        return self._ask.reader.symbolic(expr)

    def _two_sides(self, name: str, first: Term, second: Term, node: Node) -> None:
        t = self._ask.reader.terms
        self._side(name, t.less(first, second), node)
        self._side(name, t.less(second, first), node)

    def _side(self, name: str, holds: Term, node: Node) -> None:
        if any(part.op == "apply" for part in holds.walk()):
            self._unknown = self._unknown or f"{name}@{place_of(node)}"
            return
        said = f"{name.lower()}@{place_of(node)}"
        if holds.number is not False:
            self._sides.setdefault((said, holds), _Side(said, holds))
