"""Does a region compute (x - zero point) · scale of stored integers, and which tensors are those? It is run to find
out.

All inputs but one are held still. To learn which element of that one is used at which place of the result, its elements
are numbered, and for each bit b of the numbers those with bit b set are changed. The places at which the result changes
are those of elements whose number has bit b.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.fx import Node

from fxfuse.graph.region import Region
from fxfuse.graph.view import fake
from fxfuse.proof.evaluate import CannotEvaluate, Evaluator, draw, generator
from fxfuse.recognise.answers import NEAR, Reason

_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Part:
    """The part that one input has in the scale or in the zero point."""

    place: int
    """Which of `Region.others`."""
    index: Tensor
    """Number of its element at each place of the result."""
    sign: int
    """For a scale 1 if it multiplies, -1 if it divides. For a zero point 1, or -1 if it is added to x."""


@dataclass(frozen=True)
class ScaledIntegers:
    """y = (x - zero point) · scale."""

    index: Tensor
    """Number of x's element at each place of the result."""
    scales: tuple[Part, ...]
    factor: float
    """A constant factor of the scale, beside these inputs."""
    zeros: tuple[Part, ...]
    zero: int
    """A constant summand of the zero point, beside these inputs."""


class Asked:
    """A region whose first input is stored integers, to be run with chosen inputs."""

    def __init__(self, region: Region, evaluator: Evaluator, held: Mapping[Node, Tensor]) -> None:
        self.region, self.evaluator = region, evaluator
        self.x = fake(region.sources[0])
        gen = generator(11)
        self.given = [torch.eye(int(fake(n).shape[-1]), dtype=torch.float64) for n in region.sources[1:]]
        """If the region is a product: a unit matrix for the other operand, so that the result is the weight."""
        self.others = [held[n] if n in held else _draw(draw(n, evaluator, gen), fake(n).dtype) for n in region.others]
        self.held = frozenset(region.others.index(n) for n in held)
        """Places of the inputs that keep their value."""

    def __call__(self, x: Tensor | int, others: list[Tensor] | None = None) -> Tensor:
        """The result for these integers, or for one number throughout."""
        if isinstance(x, int):
            x = torch.full(self.x.shape, x, dtype=self.x.dtype)
        result = self.evaluator.region(self.region, [x, *self.given, *(self.others if others is None else others)])
        if not bool(result.isfinite().all()):
            raise _Otherwise
        return result

    def slope_and_zero(self, others: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The scale, and the zero point, at each place of the result."""
        at_0, at_1 = self(0, others), self(1, others)
        slope = at_1 - at_0
        if bool((slope == 0).any()):
            raise _Otherwise
        return slope, -at_0 / slope

    def ratios(self, place: int, value: Tensor, slope: Tensor, zero: Tensor) -> tuple[Tensor, bool]:
        """By what the scale is multiplied if one input takes this value; and whether the zero point stays as it is."""
        changed, moved = self.slope_and_zero(_with(self.others, place, value))
        return changed / slope, _close(moved, zero)


class _Otherwise(Exception):
    pass


def scaled_integers(
    region: Region, evaluator: Evaluator, names: Sequence[str], held: Mapping[Node, Tensor] = MappingProxyType({})
) -> ScaledIntegers | Reason:
    """What scales the region's integers, and where their zero is.

    Args:
        names: names of `Region.others`, for the words of reasons.
        held: inputs that keep what the program holds for them, because they say where others are read.
    """
    try:
        asked = Asked(region, evaluator, held)
        return _answer(asked, names)
    except _Otherwise:
        return Reason("its result is not (x - zero point) · scale of the integers x", NEAR)
    except CannotEvaluate as why:
        return Reason(str(why), NEAR)


def _answer(asked: Asked, names: Sequence[str]) -> ScaledIntegers | Reason:
    slope, zero = asked.slope_and_zero()
    scales, zeros = [], []
    for place, value in enumerate(asked.others):
        if place in asked.held:
            continue
        doubled, still = asked.ratios(place, value * 2, slope, zero)
        if still and (sign := 1 if _close(doubled, 2.0) else -1 if _close(doubled, 0.5) else 0):
            scales.append((place, sign))
        elif still and _close(doubled, 1.0):
            continue  # only its type or shape is used
        elif not _close(doubled, 1.0):
            why = f"{names[place]} is added in the unit of the result, where DequantizeLinear has a zero point"
            return Reason(why, NEAR)
        elif value.is_floating_point():
            return Reason(f"{names[place]}, which is taken off the integers, is not known to hold integers", NEAR)
        else:
            step = asked.slope_and_zero(_with(asked.others, place, value + 1))[1] - zero
            sign = round(float(step.reshape(-1)[0]))
            if abs(sign) != 1 or not _close(step, float(sign)):
                raise _Otherwise
            zeros.append((place, sign))
    ones = list(asked.others)
    for place, _ in scales:
        ones[place] = torch.ones_like(ones[place])
    for place, _ in zeros:
        ones[place] = torch.zeros_like(ones[place])
    factor, zero = asked.slope_and_zero(ones)
    whole = float(zero.reshape(-1)[0].round())
    if not _close(zero, whole):
        return Reason("its zero points are no integers, or differ by numbers that are written", NEAR)
    number = float(factor.reshape(-1)[0])
    if not _close(factor, number):
        return Reason("its scales differ by numbers that are written", NEAR)

    def slope_of(place: int) -> Callable[[Tensor], Tensor]:
        return lambda value: asked.slope_and_zero(_with(ones, place, value))[0]

    def zero_of(place: int) -> Callable[[Tensor], Tensor]:
        return lambda value: asked.slope_and_zero(_with(ones, place, value))[1]

    return ScaledIntegers(
        _index(lambda x: asked(x, ones), torch.zeros(asked.x.shape, dtype=asked.x.dtype)),
        tuple(Part(p, _index(slope_of(p), ones[p]), sign) for p, sign in scales),
        number,
        tuple(Part(p, _index(zero_of(p), ones[p]), sign) for p, sign in zeros),
        int(whole),
    )


def _index(ask: Callable[[Tensor], Tensor], base: Tensor) -> Tensor:
    """The number of an input's element at each place of the result; `base` is the input's value with no bit set."""
    before = ask(base)
    numbers = torch.arange(base.numel()).reshape(base.shape)
    index = torch.zeros(before.shape, dtype=torch.int64)
    for bit in range(max(base.numel() - 1, 1).bit_length()):
        after = ask(base + ((numbers >> bit) & 1).to(base.dtype))
        index |= (after != before).to(torch.int64) << bit
    return index


def _with(values: list[Tensor], place: int, value: Tensor) -> list[Tensor]:
    return [value if n == place else t for n, t in enumerate(values)]


def _draw(value: Tensor, kind: torch.dtype) -> Tensor:
    """A draw for one input: floats far from 0 for scales, small whole numbers other than 0 for integers."""
    return value.abs() + 0.5 if kind.is_floating_point else value + 1


def _close(a: Tensor, b: Tensor | float) -> bool:
    other = b if isinstance(b, Tensor) else torch.full_like(a, b)
    return torch.allclose(a, other, rtol=_TOLERANCE, atol=_TOLERANCE)
