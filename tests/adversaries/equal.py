"""Is a fused program's every element the unfused one's, up to what that element's own arithmetic may lose?

An element e of the unfused float32 program may be off by

    64 u·|e|                  two spellings of one sum of a few terms;
    32 · the largest change   of e in runs with noise (`rounding`): what the program's own order of evaluation loses at
                              this element, and so what another order may lose. Noise is 4 units where rounding is one
                              half to one, and a sum over a row of n terms wanders by less than √n units for n ≤ 300;
    32 · its change          where casts and comparisons are pushed over what they are near to;
    8 · |e - exact|           what the unfused program is off from float64: where it is far off, a fusion that is not
                              has done no harm.

All but the first may be small by chance at one element. So each element is allowed at least the middle value of its
row, taken as a share of each element's own size: a small element beside a large one gets nothing from it. Means over
the values of keys that cancel are covered by the second term, because products are noisy before they are added.

Left out are elements that are not finite in the unfused program (rows that see no key may be nan), and runs in which it
overflows anywhere: there is no answer to keep.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import ExportedProgram

from tests.adversaries.rounding import Rerun

UNIT = 2.0**-24
UNITS, NOISE, EXACT = 64.0, 32.0, 8.0
RUNS = 4
"""Runs with noise."""
UNDERFLOW = 1e-36
"""Where numbers of float32 lose places because they are tiny, times the greatest input."""


@dataclass(frozen=True)
class Difference:
    """The element that is off by most, against what it may be off by."""

    output: int
    place: tuple[int, ...]
    expected: float
    actual: float
    allowed: float
    share: float
    """Of the elements, those that are off by more than they may."""

    def __str__(self) -> str:
        where = f"output {self.output} at {list(self.place)}"
        return (
            f"{where}: {self.actual:.7g} for {self.expected:.7g}, allowed {self.allowed:.1e}; {self.share:.1%} are off"
        )


def difference(
    program: ExportedProgram, inputs: tuple[Tensor, ...], expected: list[Tensor], actual: list[Tensor]
) -> Difference | None:
    """Where `actual`, which the fused program gave on `inputs`, is not `expected`, which `program` gave; or None."""
    assert [(t.shape, t.dtype) for t in expected] == [(t.shape, t.dtype) for t in actual], "shapes and types"
    largest = max((float(t.abs().max()) for t in inputs if t.is_floating_point() and t.numel()), default=1.0)
    floor = UNDERFLOW * max(largest, 1.0)
    cheap = [UNITS * UNIT * _size(e) + floor for e in expected]
    if all(_worst(n, *three) is None for n, three in enumerate(zip(expected, actual, cheap, strict=True))):
        return None
    module = program.module(check_guards=False)
    plain = Rerun(module)
    again = plain.outputs(*inputs)
    if plain.overflows:
        return None
    exact = Rerun(module, wide=True).outputs(*inputs)
    reruns = [Rerun(module, noise=n) for n in range(RUNS)]
    runs = [rerun.outputs(*inputs) for rerun in reruns]
    pushes = {place: _push(plain.jumps[place], [rerun.jumps[place] for rerun in reruns]) for place in plain.jumps}
    for sign in (1, -1) if pushes else ():
        runs.append(Rerun(module, pushes={place: sign * push for place, push in pushes.items()}).outputs(*inputs))
    for n, (e, a, base) in enumerate(zip(expected, actual, cheap, strict=True)):
        off = EXACT * _off(exact[n], e)
        for run in runs:
            off = torch.maximum(off, NOISE * _off(run[n], again[n]))
        worst = _worst(n, e, a, base + _over_rows(off, e))
        if worst is not None:
            return worst
    return None


def _size(t: Tensor) -> Tensor:
    return t.double().abs().nan_to_num(0.0, 0.0, 0.0)


def _off(a: Tensor, b: Tensor) -> Tensor:
    """How far apart; infinite where one is not finite, for there a little noise takes the answer away."""
    return (a.double() - b.double()).abs().nan_to_num(torch.inf, torch.inf)


def _push(value: Tensor, noisy: list[Tensor]) -> Tensor:
    """How far off may be what jumps?"""
    change = torch.stack([_off(run, value) for run in noisy]).amax(0)
    return (NOISE * change + UNITS * UNIT * _size(value)).nan_to_num(0.0, 0.0).to(value.dtype)


def _over_rows(off: Tensor, expected: Tensor) -> Tensor:
    """At least the middle one of a row, in shares of the elements' own size."""
    if not expected.dim() or not expected.shape[-1]:
        return off
    size = _size(expected)
    middle = (off / size.clamp(min=1e-300)).median(-1, keepdim=True).values
    return torch.maximum(off, (middle * size).nan_to_num(0.0))


def _worst(n: int, expected: Tensor, actual: Tensor, allowed: Tensor) -> Difference | None:
    if not expected.is_floating_point():
        allowed = torch.zeros(())
    defined = expected.isfinite()
    distance = (actual.double() - expected.double()).abs().nan_to_num(torch.inf, torch.inf)
    wrong = defined & ~(distance <= allowed)
    if not wrong.any():
        return None
    excess = torch.where(wrong, distance / allowed.clamp(min=1e-300), -1.0)
    place = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    allowed = allowed.expand(expected.shape)
    share = float(wrong.double().mean())
    return Difference(n, place, float(expected[place]), float(actual[place]), float(allowed[place]), share)
