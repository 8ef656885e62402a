"""Which element of which tensor is each measured cos and sin?

Every element of the region's other inputs had a value that occurs once, so a measured value tells where it comes from.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from fxfuse.recognise.answers import Reason

Part = Literal["whole", "real", "imag"]


@dataclass(frozen=True)
class Step:
    """What one axis of the tensor that cos or sin is read from stands for."""

    kind: Literal["drop", "select", "pair", "axis", "tile"]
    """Whether it has size 1, is read at one index, counts the pairs, is an axis of x, or is repeated along an axis of
    x."""
    start: int = 0
    """The index selected, or where the pairs start."""
    step: int = 1
    axis: int = -1
    """The axis of x."""
    times: int = 1
    """How often x's axis repeats the source's."""


@dataclass(frozen=True)
class Cache:
    """The table of cos or sin, as a view of `Region.others[index]`."""

    index: int
    part: Part
    negative: bool
    steps: tuple[Step, ...]
    pairs: int

    @property
    def axes(self) -> set[int]:
        """The axes of x that the values differ along."""
        return {s.axis for s in self.steps if s.kind in ("axis", "tile")}

    def read(self, source: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
        """The values as ``[*axes, pairs]``, size 1 where they do not differ along an axis."""
        if self.part != "whole":
            source = source.resolve_conj() if source.is_conj() else source
            source = torch.view_as_real(source).select(-1, int(self.part == "imag"))
        order: dict[int, int] = {}
        at = 0
        for step in self.steps:
            if step.kind == "drop":
                source = source.squeeze(at)
            elif step.kind == "select":
                source = source.select(at, step.start)
            elif step.kind == "pair":
                stop = step.start + (self.pairs - 1) * step.step + 1
                if (step.start, stop, step.step) != (0, source.shape[at], 1):
                    source = source.narrow(at, step.start, stop - step.start)
                    source = source if step.step == 1 else source[(slice(None),) * at + (slice(None, None, step.step),)]
                order[len(axes)] = at
                at += 1
            else:
                if step.kind == "tile":
                    shape = (*source.shape[:at], step.times, *source.shape[at:])
                    source = source.unsqueeze(at).expand(shape).flatten(at, at + 1)
                order[axes.index(step.axis)] = at
                at += 1
        source = (
            source.permute([order[a] for a in sorted(order)])
            if sorted(order.values()) != list(order.values())
            else source
        )
        for position in range(len(axes) + 1):  # with a single pair there is no axis of pairs
            if position not in order:
                source = source.unsqueeze(position)
        return -source if self.negative else source


@dataclass(frozen=True)
class Caches:
    cos: Cache
    sin: Cache


def read_caches(
    rows: Iterable[tuple[torch.Tensor, torch.Tensor]], inputs: list[torch.Tensor]
) -> tuple[Caches, ...] | Reason:
    """cos and sin of each row of a pair as views of the region's other inputs.

    Args:
        rows: the measured values of cos and sin, each ``[*positions, pairs]``.
        inputs: the unique values that they were measured with.
    """
    found = []
    for values in rows:
        cos, sin = (find_cache(v, inputs, what) for v, what in zip(values, ("cos", "sin"), strict=True))
        if isinstance(cos, Reason):
            return cos
        if isinstance(sin, Reason):
            return sin
        found.append(Caches(cos, sin))
    return tuple(found)


def find_cache(values: torch.Tensor, inputs: list[torch.Tensor], what: str) -> Cache | Reason:
    """Find the one input that all these values are elements of, and how its axes are read."""
    for index, source in enumerate(inputs):
        parts: list[tuple[Part, torch.Tensor]] = [("whole", source)]
        if source.is_complex():
            parts = [("real", source.real), ("imag", source.imag)]
        for part, data in parts:
            if not data.dtype.is_floating_point:
                continue
            places = _places(values, data)
            if places is None:
                continue
            sign = torch.sign(values * data.reshape(-1)[places])
            if (sign != sign.flatten()[0]).any():
                return Reason(f"a rotation, but the sign of {what} differs between positions or pairs", 2)
            steps = _steps(places, tuple(data.shape), values.shape, what)
            if isinstance(steps, Reason):
                return steps
            return Cache(index, part, bool(sign.flatten()[0] < 0), steps, values.shape[-1])
    return Reason(f"a rotation, but {what} is not an element of any one tensor it reads (scaled, or mixed?)", 2)


def _places(values: torch.Tensor, source: torch.Tensor) -> torch.Tensor | None:
    """Flat index into `source` of every value, up to sign; None where one is not in it."""
    flat = source.reshape(-1).abs()
    if not flat.numel():
        return None
    ordered, index = flat.sort()
    wanted = values.abs().contiguous()
    near = torch.searchsorted(ordered, wanted * (1 - 1e-12)).clamp(max=flat.numel() - 1)
    found = (ordered[near] - wanted).abs() <= 1e-10 * wanted
    return index[near] if bool(found.all()) else None


def _steps(places: torch.Tensor, source: tuple[int, ...], shape: torch.Size, what: str) -> tuple[Step, ...] | Reason:
    """What each axis of the source stands for: the axis of x, if any, that its coordinate is a function of."""
    steps = []
    stride = 1
    for size in reversed(source):
        coordinate = places // stride % size
        stride *= size
        step = _step(coordinate, size, shape)
        if step is None:
            return Reason(f"a rotation, but {what} is read from its tensor in no regular order (other positions?)", 2)
        steps.append(step)
    if sum(s.kind == "pair" for s in steps) > 1:
        return Reason(f"a rotation, but {what} is read from its tensor in no regular order (other positions?)", 2)
    return tuple(reversed(steps))


def _step(coordinate: torch.Tensor, size: int, shape: torch.Size) -> Step | None:
    first = coordinate.flatten()[0]
    if size == 1:
        return Step("drop")
    along = coordinate.reshape(-1, shape[-1])[0]
    if shape[-1] > 1 and bool((coordinate == along).all()) and bool((along != first).any()):
        step = int(along[1] - along[0])
        regular = along[0] + step * torch.arange(shape[-1])
        return Step("pair", int(along[0]), step) if step > 0 and bool((along == regular).all()) else None
    for axis, length in enumerate(shape[:-1]):
        counted = torch.arange(length).view(-1, *[1] * (len(shape) - axis - 1))
        if length == size and length > 1 and bool((coordinate == counted).all()):
            return Step("axis", axis=axis)
        if length > size and length % size == 0 and bool((coordinate == counted % size).all()):
            return Step("tile", axis=axis, times=length // size)
    if bool((coordinate == first).all()):
        return Step("select", int(first))
    return None
