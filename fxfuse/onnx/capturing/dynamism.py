"""Which dimensions of a capture are less dynamic than the caller asked for, and which guard of which line of the model
is to blame."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch
from torch.export import ExportedProgram

from fxfuse.onnx.capturing.asked import Asked, Inputs, at
from fxfuse.torch_seams import pytree

_TORCH = os.path.dirname(torch.__file__) + os.sep
_DYNAMO = os.path.join(_TORCH, "_dynamo")


How = Literal["fixed", "some", "bound", "equal", "tied"]
_HOW: tuple[How, ...] = "fixed", "some", "bound", "equal", "tied"


@dataclass(frozen=True)
class Guard:
    """A condition under which a capture holds, and which an ONNX file does not have."""

    expr: Any
    line: str | None
    """The model's line that it comes from."""
    asked: bool
    """Is it a question in the model's own code (an `if` on a size), and not one that an operator of torch asks?"""


@dataclass(frozen=True)
class Lost:
    """One dimension that is less dynamic than the caller asked for."""

    asked: Asked
    how: How
    """fixed: it has one size. some: the capture holds for some of its sizes. bound: the capture holds on this side of a
    size that the model asks about, or at all sizes but that. equal: the capture holds where two dimensions are of one
    size. tied: it holds where the dimension is computed from others as it happens to be in the sample (4 · batch)."""
    guard: Guard | None
    other: Asked | None = None

    def __str__(self) -> str:
        a = self.asked
        if self.how == "fixed":
            text = f"{a.where} is {a.size} in the graph, whatever comes in"
        elif self.how == "equal" and self.other is not None:
            text = f"{a.where} and {self.other.where} are one size in the graph, as they are in the sample"
        elif self.how == "tied":
            text = f"{a.where} is computed from other sizes in the graph, as it happens to be in the sample"
        else:
            text = f"the graph holds for some sizes of {a.where} alone"
        if self.guard is not None:
            text += f": guard {self.guard.expr}" + (f", from {self.guard.line}" if self.guard.line else "")
        elif self.how == "fixed" and a.size in (0, 1):
            text += f": torch.export takes a sample of {a.size} for a constant there"
        return text


def guards(program: ExportedProgram) -> list[Guard]:
    """All guards of the capture. A program that was loaded from a file has none: torch does not keep them."""
    values = (n.meta.get("val") for n in program.graph.find_nodes(op="placeholder"))
    mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None)
    env = getattr(mode, "shape_env", None)
    return [_guard(g) for g in env.guards] if env is not None else []


def _guard(found: Any) -> Guard:
    place = getattr(found.sloc, "framework_loc", None)
    file = str(getattr(place, "filename", place or ""))
    return Guard(
        found.expr, getattr(found.sloc, "maybe_user_loc", None), not file.startswith(_TORCH) or file.startswith(_DYNAMO)
    )


def sizes(program: ExportedProgram, inputs: Inputs) -> list[Any] | None:
    """What the capture has for each flattened input: a fake tensor, a symbolic number, or None; None if that is
    not known."""
    values = {n.name: n.meta.get("val") for n in program.graph.find_nodes(op="placeholder")}
    names = program.graph_signature.user_inputs
    leaves = pytree.tree_leaves(inputs)
    if len(names) != len(leaves):
        return None
    return [values.get(name) if isinstance(name, str) else None for name in names]


def size_of(value: Any, asked: Asked) -> Any:
    """The expression that the capture has for this dimension: a sympy one, or a number."""
    if asked.axis is not None:
        value = value.shape[asked.axis] if isinstance(value, torch.Tensor) else asked.size
    expr = value.node.expr if isinstance(value, torch.SymInt) else value
    return int(expr) if expr is None or isinstance(expr, int) or expr.is_number else expr


def lost(program: ExportedProgram, asked: Sequence[Asked], inputs: Inputs) -> list[Lost]:
    """Dimensions that the capture fixed, or holds for some sizes of only.

    A bound that an operator has (the rows of a table) is no loss, nor is a size that operators compute from others (the
    mask's length, of past and new tokens); a bound, an exception or an equality that the model asks about may be.
    """
    values = sizes(program, inputs)
    if values is None:
        return []
    exprs = {a: size_of(values[a.leaf], a) for a in at(asked, inputs) if values[a.leaf] is not None}
    known = {e: a.size for a, e in exprs.items() if getattr(e, "is_Symbol", False)}
    conditions = guards(program)
    found: list[Lost] = []
    done: set[Any] = set()
    for one, expr in exprs.items():
        if isinstance(expr, int):
            found.append(Lost(one, "fixed", _that_fixed(one, conditions, known)))
        elif expr.is_Symbol and expr not in done:
            done.add(expr)
            refusing = _refusing(expr, one.size, conditions, known)
            if refusing is not None:
                found.append(Lost(one, refusing[0], refusing[1]))
        elif not expr.is_Symbol and expr not in done:
            done.add(expr)
            tying = next((g for g in conditions if g.asked and _ties(g.expr, expr)), None)
            if tying is not None:
                found.append(Lost(one, "tied", tying))
    return found


def _ties(condition: Any, size: Any) -> bool:
    """Is it by this condition that the capture computes a dimension as `size`, and has no symbol for it any more?"""
    return isinstance(condition, sympy.Eq) and size in condition.args and size.free_symbols < condition.free_symbols


def _that_fixed(asked: Asked, conditions: Sequence[Guard], known: dict[Any, int]) -> Guard | None:
    """The guard that says of a symbol which is no size any more that it is this number."""
    for guard in conditions:
        expr = guard.expr
        if isinstance(expr, sympy.Eq) and any(s not in known for s in expr.free_symbols):
            first, second = expr.args
            if (first.is_Symbol and second == asked.size) or (second.is_Symbol and first == asked.size):
                return guard
    return None


def _refusing(symbol: Any, size: int, conditions: Sequence[Guard], known: dict[Any, int]) -> tuple[How, Guard] | None:
    """A guard that admits no size but this, or not all around it, or that bounds it, in this order."""
    found: dict[How, Guard] = {}
    tried = [n for n in (size - 1, size + 1, size + 2, size + 3, 2 * size, 2 * size + 1) if n >= 2 and n != size]
    for guard in conditions:
        if symbol not in guard.expr.free_symbols or _is_exception(guard):
            continue
        refused = [n for n in tried if refuses(guard, symbol, n, known)]
        if len(refused) == len(tried):
            found.setdefault("fixed", guard)
        elif refused and refused not in (tried[: len(refused)], tried[-len(refused) :]):
            found.setdefault("some", guard)
        elif guard.asked and beyond(guard, symbol, size, known) is not None:
            found.setdefault("bound", guard)
    return next(((how, found[how]) for how in _HOW if how in found), None)


def refuses(guard: Guard, symbol: Any, size: int, known: dict[Any, int]) -> bool:
    """Does the guard rule out this size, the others being as they are?

    Of a size at which it has no value (a remainder by 0, or of what is below 0) nothing is said: torch's own functions
    raise there (`PythonMod` and `Mod` in torch/utils/_sympy/functions.py).
    """
    try:
        return bool(guard.expr.xreplace({**known, symbol: sympy.Integer(size)}) == sympy.false)
    except (ZeroDivisionError, AssertionError):
        return False


def beyond(guard: Guard, symbol: Any, size: int, known: dict[Any, int]) -> int | None:
    """The nearest size that was found which the guard rules out."""
    numbers = {int(n) + more for n in guard.expr.atoms(sympy.Integer) for more in (-1, 0, 1, 2)}
    numbers |= {n for other, n in known.items() if other in guard.expr.free_symbols}
    near = sorted(numbers | {size + 1, size - 1, 2 * size + 1}, key=lambda n: abs(n - size))
    return next((n for n in near if 2 <= n <= _LARGEST and refuses(guard, symbol, n, known)), None)


_LARGEST = 1 << 16


def _is_exception(guard: Guard) -> bool:
    """Is it a size that an operator treats apart, and that was not met? torch does so where a slice is the whole.

    A size that the model itself treats apart is none: there it may compute something else.
    """
    plain = any(a.is_number for a in guard.expr.args) or all(a.is_Symbol for a in guard.expr.args)
    return not guard.asked and isinstance(guard.expr, sympy.Ne) and plain


def equal_by_chance(
    program: ExportedProgram, asked: Sequence[Asked], inputs: Inputs
) -> tuple[Asked, Asked, Guard | None] | None:
    """Two dimensions of one symbol, asked for apart, that may be equal in the sample alone: of one tensor, or since
    the model asked whether they are equal. Operators that add two tensors make their sizes one symbol too."""
    values = sizes(program, inputs)
    if values is None:
        return None
    of: dict[Any, list[Asked]] = {}
    for one in asked:
        expr = size_of(values[one.leaf], one) if values[one.leaf] is not None else one.size
        if not isinstance(expr, int):
            of.setdefault(expr, []).append(one)
    equalities = [g for g in guards(program) if isinstance(g.expr, sympy.Eq) and all(a.is_Symbol for a in g.expr.args)]
    for expr, dims in of.items():
        guard = next((g for g in equalities if expr in g.expr.args), None)
        for place, first in enumerate(dims):
            for second in dims[place + 1 :]:
                apart = first.group != second.group
                if apart and (first.leaf == second.leaf or any(g.asked and expr in g.expr.args for g in equalities)):
                    return first, second, next((g for g in equalities if g.asked and expr in g.expr.args), guard)
    return None
