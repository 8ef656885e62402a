"""What region and replacement are run on: sizes, magnitudes, outliers, masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxfuse.graph.region import Region
from fxfuse.proof.evaluate import generator


@dataclass(frozen=True)
class Variant:
    """One way to draw inputs."""

    name: str
    profile: int = 0
    """Which sizes; see `Sizes`."""
    scale: float = 1.0
    """What the sources are multiplied with."""
    others: float = 1.0
    """What the floating-point tensors beside them are multiplied with."""
    only: int | None = None
    """Only this input is multiplied, the others are as they are."""
    outlier: float = 1.0
    """What one feature of each position is multiplied with."""
    signs: int = 0
    """1: all sources are positive; -1: the first is, the others are negative."""
    special: tuple[float, ...] = ()
    """Numbers that some elements are set to."""
    large: tuple[tuple[Any, int], ...] = ()
    """Sizes for symbols of the region."""

    @property
    def magnitude(self) -> float:
        return self.scale * self.outlier


BASE = (
    Variant("ordinary"),
    Variant("small", profile=1, scale=1e-3),
    Variant("large", scale=1e3),
    Variant("tiny", profile=1, scale=1e-6),
    Variant("single", profile=2),
    Variant("beside large", scale=30.0, others=1e3),
)
"""Always run: of analytic functions these are the proof."""
GENTLE = (Variant("multiples", 3), Variant("multiples, small", 3, 0.1), Variant("half", 0, 0.5))
"""Run where too few of those could be: sizes that must divide, a type that overflows early."""
BELOW = (
    Variant("scores below 0", scale=3.0, signs=-1),
    Variant("scores far below 0", scale=10.0, signs=-1),
)
"""Run for operators that average: here sums of exponentials are no larger than a constant that may be added to them,
so that leaving the constant out shows."""


def at_numbers(numbers: Sequence[float]) -> Iterator[Variant]:
    """Magnitudes at which a number of the region shows: its own, and its root, for what is squared."""
    scales = {}
    for number in numbers:
        for scale in (abs(number), abs(number) ** 0.5):
            if 1e-30 < scale < 1e9 and not 1e-6 <= scale <= 1e3:
                scales[f"{scale:.0e}"] = scale
    for text, scale in list(scales.items())[:12]:
        yield Variant(f"at {text}", scale=scale)


def searches(sources: int, inputs: int, literals: Sequence[float]) -> Iterator[Variant]:
    """Where pieces that did not run yet are looked for, likelier ones first."""
    for scale in (30.0, 1e6, 300.0, 1e-2, 1e4, 1e5, 1e-4, 1e-5, 1e-1, 10.0, 100.0, 1e-8, 1e-12, 1e-20):
        yield Variant(f"×{scale:g}", scale=scale)
    for outlier in (1e2, 1e4, 1e6):
        yield Variant(f"one feature ×{outlier:g}", outlier=outlier)
    for signs in (1, -1):
        for scale in (1.0, 30.0, 1e3):
            yield Variant(f"one sign, ×{scale:g}", scale=scale, signs=signs)
    yield Variant("zeros", special=(0.0,))
    if literals:
        yield Variant("at the numbers of the region", special=tuple(literals))
    for only in range(inputs):
        for scale in (1e3, 1e-3, 1e6, 1e-6, 1e8, -1.0):
            beside = only >= sources
            yield Variant(f"input {only} ×{scale:g}", only=only, others=scale if beside else 1.0, scale=scale)
    yield Variant("everything ×1e3", scale=1e3, others=1e3)
    for seed in range(3):
        yield Variant(f"again {seed}", profile=seed % 2, scale=(1.0, 3.0, 0.3)[seed])


def varied(region: Region, variant: Variant, inputs: list[Tensor], beside: bool, seed: int) -> list[Tensor]:
    """The region's inputs as the variant has them; `beside`: may what is read beside the sources be changed?"""
    changed = _varied(variant, inputs, len(region.sources), beside, seed)
    return [changed[region.inputs.index(node)] for node in region.inputs]  # one value where q is k too


def _varied(variant: Variant, inputs: list[Tensor], sources: int, beside: bool, seed: int) -> list[Tensor]:
    gen = generator(seed)
    changed = []
    for place, value in enumerate(inputs):
        floating = value.is_floating_point() or value.is_complex()
        if not floating or (place >= sources and not beside):
            changed.append(value)
            continue
        if variant.only is not None:
            factor = (variant.scale if place < sources else variant.others) if place == variant.only else 1.0
        else:
            factor = variant.scale if place < sources else variant.others
        value = value * factor if factor != 1.0 else value
        if place < sources and variant.signs and not value.is_complex():
            value = value.abs() if variant.signs > 0 or place == 0 else -value.abs()
        if place < sources and variant.outlier != 1.0 and value.dim():
            value = value.clone()
            value[..., 0] *= variant.outlier
        if variant.special and place < sources and not value.is_complex() and value.numel():
            value = value.clone()
            flat = value.view(-1)
            picked = torch.rand(flat.shape, generator=gen) < 0.3
            numbers = torch.tensor(variant.special, dtype=value.dtype)
            flat[picked] = numbers[torch.randint(0, len(numbers), (int(picked.sum()),), generator=gen)]
        changed.append(value)
    return changed


ROWS = ("keys dropped", "rows dropped", "one key kept")
"""How masks are drawn where rows may see no key."""


def masked(value: Tensor, how: str, number: float, seed: int) -> Tensor:
    """A mask with whole rows, or all keys but one, dropped; of a boolean one either value drops.

    Args:
        number: what drops a key in a mask that is added.
    """
    gen = generator(seed)
    if value.dim() == 0 or value.shape[-1] == 0:
        return value
    rows = torch.rand((*value.shape[:-1], 1), generator=gen)
    keys = torch.rand(value.shape, generator=gen)
    if value.dtype == torch.bool:
        if how == "rows dropped":
            all_or_none = (rows < 0.4).expand(value.shape)
            return torch.where(rows < 0.8, all_or_none, value)
        if how == "one key kept":
            chosen = keys == keys.amax(-1, keepdim=True)
            return torch.where(rows < 0.5, chosen, ~chosen)
        return keys < 0.5
    if how == "rows dropped":
        dropped = (rows < 0.5).expand(value.shape)
    elif how == "one key kept":
        dropped = keys != keys.amax(-1, keepdim=True)
    else:
        dropped = (keys < 0.4) & (keys != keys.amax(-1, keepdim=True))
    return value.masked_fill(dropped, number)
