"""Does a condition on positions hold for all sizes? By structure where that suffices, else z3 decides.

Integers with `//`, `%` by constants, comparisons and choices are decidable, and z3 hands back the place where two masks
differ. Without z3 (`pip install z3-solver`) only what structure shows is decided.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fxfuse.proof.positions.terms import Term, Terms

MILLISECONDS = 2000
_INFINITE = 10**45


@dataclass(frozen=True)
class Holds:
    """The condition holds at every size that the program admits."""

    how: str
    """``"by structure"`` or ``"z3"``."""


@dataclass(frozen=True)
class Fails:
    """It does not, and these are places and sizes where it does not."""

    values: dict[str, int]


@dataclass(frozen=True)
class Undecided:
    """Nothing is claimed; the message says why not."""

    why: str


Verdict = Holds | Fails | Undecided


def always(terms: Terms, condition: Term, given: Iterable[Term] = (), *, smallest: Sequence[str] = ()) -> Verdict:
    """Does `condition` hold wherever everything `given` does?

    Args:
        smallest: variables that a counterexample should have small, in this order.
    """
    if condition is terms.true:
        return Holds("by structure")
    sides = [side for side in given if side is not terms.true]
    if terms.every(sides) is terms.false:
        return Holds("by structure")
    steps = [t for t in condition.walk() if t.op in ("apply", "given")]
    unknown = next((t for t in steps if t.args[0] not in _OUR_OWN), steps[0] if steps else None)
    try:
        import z3  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        return Undecided("z3 is not installed (pip install z3-solver)")
    writer = _Writer(z3)
    solver = z3.Solver()
    solver.set("timeout", MILLISECONDS)
    wrong = z3.Not(writer.boolean(condition))
    for side in sides:
        solver.add(writer.boolean(side))
    solver.add(*writer.bounds())
    solver.add(wrong)
    answer = solver.check()
    if answer == z3.unsat:
        return Holds("z3")
    if answer != z3.sat:
        return Undecided("z3 came to no answer in time")
    if unknown is not None:
        return Undecided(f"it depends on {_said(unknown)}")
    values = writer.values(solver.model())
    for name in smallest:
        if name in values:
            values = _smaller(z3, solver, writer, name, values)
    return Fails(values)


def _smaller(z3: Any, solver: Any, writer: _Writer, name: str, values: dict[str, int]) -> dict[str, int]:
    """The counterexample with the smallest value of one variable, which is then held there."""
    variable = writer.variables[name]
    low, high = writer.lowest[name] - 1, values[name]
    while high - low > 1:
        middle = (low + high) // 2
        solver.push()
        solver.add(variable <= middle)
        if solver.check() == z3.sat:
            values = writer.values(solver.model())
            high = values[name]
            solver.pop()
        else:
            solver.pop()
            low = middle
    solver.add(variable == high)
    return values


_OUR_OWN = frozenset(["at_most", "equal", "neg"])
"""Comparisons and signs that terms apply to steps that are not known. They are no steps of the program themselves."""


def _said(term: Term) -> str:
    if term.op == "given":
        return f"the values of {str(term.args[0]).removeprefix('table ')}"
    return str(term.args[0]).removeprefix("aten.")


class _Writer:
    """Terms as z3 expressions."""

    def __init__(self, z3: Any) -> None:
        self.z3 = z3
        self.variables: dict[str, Any] = {}
        self.lowest: dict[str, int] = {}
        self._bounds: list[Any] = []
        self._known: dict[Term, Any] = {}

    def bounds(self) -> list[Any]:
        return self._bounds

    def values(self, model: Any) -> dict[str, int]:
        return {name: model.eval(v, True).as_long() for name, v in self.variables.items()}

    def boolean(self, term: Term) -> Any:
        value = self(term)
        return value if term.kind == "bool" else value != 0

    def __call__(self, term: Term) -> Any:
        for part in _inside_out(term):
            if part not in self._known:
                self._known[part] = self._write(part)
        return self._known[term]

    def _write(self, term: Term) -> Any:
        z3, args, known = self.z3, term.args, self._known
        if term.op == "number":
            return self._number(args[0])
        if term.op == "variable":
            return self._variable(term)
        if term.op == "sum":
            return z3.Sum([known[t] * c for t, c in args[1]]) + args[0]
        if term.op == "product":
            return known[args[0]] * known[args[1]]
        if term.op == "quotient":
            return known[args[0]] / args[1]
        if term.op == "remainder":
            return known[args[0]] % args[1]
        if term.op == "natural":
            return known[args[0]] >= 0
        if term.op == "zero":
            return known[args[0]] == 0
        if term.op == "not":
            return z3.Not(known[args[0]])
        if term.op == "and":
            return z3.And([known[a] for a in args])
        if term.op == "choose":
            first, second = (self._as(known[a], a.kind, term.kind) for a in args[1:])
            return z3.If(known[args[0]], first, second)
        operands = [a for a in args if isinstance(a, Term)]
        name = "·".join([term.op, *(str(a) for a in args if not isinstance(a, Term))])
        sorts = {"int": z3.IntSort(), "bool": z3.BoolSort(), "real": z3.RealSort()}
        if not operands:
            return z3.Const(name, sorts[term.kind])
        signature = [sorts[a.kind] for a in operands]
        return z3.Function(f"{name}·{[a.kind for a in operands]}", *signature, sorts[term.kind])(
            *(known[a] for a in operands)
        )

    def _as(self, value: Any, have: str, want: str) -> Any:
        if have == want:
            return value
        if have == "bool":
            value = self.z3.If(value, 1, 0)
        return self.z3.ToReal(value) if want == "real" else value

    def _number(self, value: Any) -> Any:
        if isinstance(value, bool):
            return self.z3.BoolVal(value)
        if isinstance(value, int):
            return self.z3.IntVal(value)
        if math.isinf(value):
            return self.z3.RealVal(_INFINITE if value > 0 else -_INFINITE)
        top, bottom = float(value).as_integer_ratio()
        return self.z3.RealVal(top) / self.z3.RealVal(bottom)

    def _variable(self, term: Term) -> Any:
        name = term.args[0]
        found = self.z3.Int(name)
        low, high = term.bounds
        if name not in self.variables:
            self.variables[name] = found
            self.lowest[name] = int(low) if not math.isinf(low) else -(2**40)
        if not math.isinf(low):
            self._bounds.append(found >= int(low))
        if not math.isinf(high):
            self._bounds.append(found <= int(high))
        return found


def _inside_out(term: Term) -> Iterable[Term]:
    order: list[Term] = []
    seen: set[Term] = set()
    stack: list[tuple[Term, bool]] = [(term, False)]
    while stack:
        here, ready = stack.pop()
        if ready:
            order.append(here)
        elif here not in seen:
            seen.add(here)
            stack.append((here, True))
            stack.extend((c, False) for c in here.children)
    return order
