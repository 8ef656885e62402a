"""What to do about captures that hold for the sample's sizes only: capture again at sizes that do not happen to fit.

A model may ask whether its length is a multiple of something (Mamba 2: `if pad_size > 0`), whether its batch is 1, or
whether batch and length are equal. Captured where they are, the program has the short way in it, and a guard that ONNX
cannot hold: the graph is then wrong at other sizes. Captured elsewhere it may have the general way, right for both.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram

from fxfuse.onnx.capturing.asked import Asked, Inputs, at
from fxfuse.onnx.capturing.dynamism import Lost, beyond, equal_by_chance, lost, size_of, sizes
from fxfuse.state.mutations import mutations
from fxfuse.torch_seams import buffers_of, drop_input_checks, pytree

Capture = Callable[[tuple[Any, ...], dict[str, Any]], ExportedProgram]


def general(
    program: ExportedProgram, module: torch.nn.Module, inputs: Inputs, asked: Sequence[Asked], capture: Capture
) -> tuple[ExportedProgram, list[Lost]]:
    """`program`, or a capture at other sizes that is more dynamic, and what is still lost.

    Another one is taken only if it computes what the module does on the sample inputs as well.
    """
    chance = equal_by_chance(program, asked, inputs)
    missing = lost(program, asked, inputs)
    if not (missing or chance) or any(p.is_meta for p in (*module.parameters(), *module.buffers())):
        return program, [one for one in missing if one.how != "bound"]  # tensors without values cannot be compared
    found = Elsewhere(module, inputs, asked, capture)
    missing = found.matters(program, inputs, missing)
    if chance is not None or any(one.how != "bound" for one in missing):
        other = found.better(program, missing, untied=chance is not None)
        if other is not None:
            return other
        if found.unlike and chance is not None and not missing:
            missing = [Lost(chance[0], "equal", chance[2], chance[1])]
    return program, missing


@dataclass
class Elsewhere:
    """A module at other sizes than its sample's."""

    module: torch.nn.Module
    inputs: Inputs
    asked: Sequence[Asked]
    capture: Capture
    unlike: bool = False
    """Does the module go another way at other sizes? A capture there does not compute what the module does on the
    sample inputs; or it runs there, and cannot be captured, or writes to more."""

    def better(
        self, program: ExportedProgram, missing: Sequence[Lost], *, untied: bool
    ) -> tuple[ExportedProgram, list[Lost]] | None:
        """A capture at other sizes that misses less and computes the same on the sample inputs, and what it misses."""
        tied = {one.asked for one in missing if one.how == "tied"}
        for sample in _samples(program, self.asked, self.inputs, untied=untied, tied=tied):
            other = _captured(self.capture, sample)
            if other is None or len(mutations(other)) > len(mutations(program)):
                self.unlike |= _elements(sample) <= _FEW and _runs(self.module, sample)
                continue
            if untied and equal_by_chance(other, self.asked, sample) is not None:
                continue
            left = lost(other, self.asked, sample)
            if left and not untied and len(left) > len(missing):
                continue
            if not _same(other, self.module, self.inputs):
                self.unlike = True
                continue
            left = self.matters(other, sample, left)
            if not left or len(left) < len(missing) or (untied and len(left) == len(missing)):
                other.example_inputs = self.inputs
                return other, left
        return None

    def matters(self, program: ExportedProgram, sample: Inputs, missing: Sequence[Lost]) -> list[Lost]:
        """Those whose guard decides what is computed: where it does not hold the module runs, and gives something else.

        The others are the model's own limits, beyond which it cannot be called; or the program is right beyond them
        too, and nothing was concluded from them: no symbol has its range from them. Where the inputs are too large to
        run the module, what can be captured beyond a bound is taken for something else; an exception (`!= 224`) is not.
        """
        found = []
        for one in missing:
            if one.how in ("some", "bound", "tied"):
                other, in_range = _beyond(program, self.asked, sample, one)
                if other is None:
                    continue
                if _elements(other) > _FEW:
                    exception = one.guard is not None and isinstance(one.guard.expr, sympy.Ne)
                    if exception or _captured(self.capture, other) is None:
                        continue
                elif not _runs(self.module, other) or (in_range and _same(program, self.module, other)):
                    continue
            found.append(one)
        return found


_FEW = 1 << 16
"""With inputs of at most so many elements a module is simply called to see whether it takes them. With larger ones it
is captured for that, which computes nothing."""


def _elements(inputs: Inputs) -> int:
    return sum(leaf.numel() for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor))


def _captured(capture: Capture, sample: Inputs) -> ExportedProgram | None:
    """None where the model cannot be called with these sizes."""
    try:
        return capture(*sample)
    except Exception:  # whatever the model or torch.export raises
        return None


def _beyond(
    program: ExportedProgram, asked: Sequence[Asked], inputs: Inputs, missing: Lost
) -> tuple[Inputs | None, bool]:
    """The inputs at a size that the guard rules out, if one was found; and does its symbol's range have that size?

    A dimension that is tied to others has no symbol: it is made larger by one, the others stay.
    """
    values = sizes(program, inputs)
    if values is None or missing.guard is None:
        return None, False
    exprs = {a: size_of(values[a.leaf], a) for a in at(asked, inputs) if values[a.leaf] is not None}
    known = {e: a.size for a, e in exprs.items() if getattr(e, "is_Symbol", False)}
    symbol = exprs[missing.asked]
    if missing.how == "tied":
        apart = {a: a.size + 1 if e == symbol else a.size for a, e in exprs.items()}
        return next(_resized(inputs, dict(apart)), None), True
    size = beyond(missing.guard, symbol, known[symbol], known)
    if size is None:
        return None, False
    allowed = program.range_constraints.get(symbol)
    in_range = allowed is None or bool(allowed.lower <= size <= allowed.upper)
    wanted = {a: _value(e, {**known, symbol: size}) for a, e in exprs.items()}
    return next(_resized(inputs, wanted), None), in_range


def _value(expr: Any, known: dict[Any, int]) -> int | None:
    """None where the size is made of symbols that are no size of any input."""
    value = expr if isinstance(expr, int) else expr.xreplace(known)
    return int(value) if isinstance(value, int) or value.is_number else None


def _samples(
    program: ExportedProgram, asked: Sequence[Asked], inputs: Inputs, *, untied: bool, tied: Collection[Asked] = ()
) -> Iterator[Inputs]:
    """The sample inputs at other sizes: one shorter each; all unequal; and what is of one symbol unequal too.

    Args:
        untied: whether dimensions of one symbol are equal by chance, so that only unequal ones are of use.
        tied: dimensions that are computed from others by chance: they get sizes of their own, too.
    """
    values = sizes(program, inputs)
    if values is None:
        return
    exprs = {a: size_of(values[a.leaf], a) for a in asked if values[a.leaf] is not None}
    symbols = {a: e if getattr(e, "is_Symbol", False) else a.group for a, e in exprs.items()}
    loose = {exprs[a] for a in tied if a in exprs}
    compound = {a: e for a, e in exprs.items() if not isinstance(e, int) and not e.is_Symbol and e not in loose}
    groups: dict[Any, int] = {symbols[a]: a.size for a in exprs if a not in compound}

    def _of(a: Asked, chosen: dict[Any, int]) -> int | None:
        return chosen[symbols[a]] if symbols[a] in chosen else _value(exprs[a], chosen)

    shorter = {g: n - 1 if n > 2 else max(n, 2) for g, n in groups.items()}
    if not untied:
        yield from _resized(inputs, {a: _of(a, shorter) for a in exprs})
    unequal = dict(zip(groups, _unequal(shorter.values()), strict=True))
    if unequal != shorter and not untied:
        yield from _resized(inputs, {a: _of(a, unequal) for a in exprs})
    if (untied or loose) and not compound:
        apart: dict[Any, int] = {}
        for a in exprs:
            apart.setdefault(a.group, a.size - 1 if a.size > 2 else 2)
        apart = dict(zip(apart, _unequal(apart.values()), strict=True))
        yield from _resized(inputs, {a: apart[a.group] for a in exprs})


def _unequal(wanted: Iterable[int]) -> list[int]:
    """These sizes or the next larger ones, no two of them equal."""
    found: list[int] = []
    for size in wanted:
        found.append(next(n for n in itertools.count(size) if n not in found))
    return found


def _resized(inputs: Inputs, wanted: dict[Asked, int | None]) -> Iterator[Inputs]:
    """The inputs at these sizes: cut, or repeated from their beginning."""
    leaves, structure = pytree.tree_flatten(inputs)
    if None in wanted.values() or any(n == 0 for n in (a.size for a in wanted)):
        return
    for a, size in wanted.items():
        if a.axis is None:
            leaves[a.leaf] = size
        else:
            tensor = leaves[a.leaf]
            picked = torch.arange(int(size or 0), device=tensor.device) % a.size
            leaves[a.leaf] = tensor.index_select(a.axis, picked)  # a copy: torch would guard on the base of a view
    yield pytree.tree_unflatten(leaves, structure)


def _runs(module: torch.nn.Module, inputs: Inputs) -> bool:
    """Can the module be called with these?"""
    try:
        with torch.no_grad():
            _run(module, inputs)
    except Exception:  # whatever it raises
        return False
    return True


def _same(program: ExportedProgram, module: torch.nn.Module, inputs: Inputs) -> bool:
    """Does the program compute what the module does on these inputs?"""
    try:
        with torch.no_grad():
            expected = _run(module, inputs)
            actual = _run(_unguarded(program), inputs)
        for e, a in zip(expected, actual, strict=True):
            if isinstance(e, torch.Tensor):
                torch.testing.assert_close(a, e, equal_nan=True)
    except Exception:  # AssertionError, or whatever running it raises
        return False
    return True


def _unguarded(program: ExportedProgram) -> torch.nn.Module:
    """The program as a module, as an ONNX file has it: at any sizes."""
    module: torch.nn.Module = program.module(check_guards=False)
    drop_input_checks(module)
    return module


def _run(module: torch.nn.Module, inputs: Inputs) -> list[Any]:
    """What the module gives. What it writes, to buffers, inputs and attributes, is written to copies."""
    args, kwargs = pytree.tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, inputs)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with _attributes_kept(module):
        return pytree.tree_leaves(torch.func.functional_call(module, buffers, args, kwargs))


@contextmanager
def _attributes_kept(module: torch.nn.Module) -> Iterator[None]:
    """What the module assigns to itself is undone."""
    parts = list(module.modules())
    before = [(dict(vars(part)), dict(buffers_of(part))) for part in parts]
    try:
        yield
    finally:
        for part, (attributes, buffers) in zip(parts, before, strict=True):
            vars(part).clear()
            vars(part).update(attributes)
            buffers_of(part).clear()
            buffers_of(part).update(buffers)
