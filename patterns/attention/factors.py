"""Tensors that multiply the scores: a temperature, a scale of each head, a factor of each query or key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product as choices

import torch

from fxfuse.patterns.attention.masks import spread_out
from fxfuse.patterns.attention.softmax_weights import Weights, centred
from fxfuse.recognise.answers import Reason

_STEP = 1e-3
"""Scores so small that a soft-cap does not show."""
_MORE = 1.5


@dataclass(frozen=True)
class Factor:
    """One tensor that the scores are multiplied with, or divided by."""

    index: int
    """Which of `Region.others` it is."""
    target: int
    """Number of the shape, among those that the scores take on their way, that it broadcasts against."""
    divides: bool


def find_factors(
    f: Weights, values: list[torch.Tensor], raw: torch.Tensor, soft: torch.Tensor
) -> tuple[Factor, ...] | Reason:
    """What makes the scores of some heads, queries or keys count more than those of others.

    Each tensor is made half as large again. If it multiplies the scores, log(weights) then moves half as much again.
    `f` is left with the product of all factors, so that later questions can undo it.
    """
    change = _change(f, values, raw, soft)
    if not torch.allclose(_change(f, values, 2 * raw, soft), 2 * change, rtol=1e-3, atol=1e-9):
        return Reason("softmax of a product, but of a function of the scores that is not linear near 0", 2)
    found: list[tuple[int, bool]] = []
    for place, value in enumerate(values):
        if not value.is_floating_point():
            continue
        more = _change(f, [v * _MORE if i == place else v for i, v in enumerate(values)], raw, soft)
        if _alike(more, change):
            continue
        if not (_alike(more, change * _MORE) or _alike(more, change / _MORE)):
            return Reason(
                f"softmax attention, but {f.nodes[place].name} goes into the scores before a function that is "
                "not linear (a soft-cap after the mask?): Attention caps first, and then adds its mask",
                3,
            )
        found.append((place, _alike(more, change / _MORE)))
    if not found:
        return Reason("softmax of a product, but the scores are not scaled by one constant", 2)
    for targets in choices(range(len(f.targets)), repeat=len(found)):
        multiplied = _product(f, values, found, targets)
        if multiplied is None:
            continue
        known = centred(raw * _STEP * multiplied, soft)
        scale = float((change * known).sum() / (known * known).sum())
        if torch.allclose(change, known * scale, rtol=1e-3, atol=abs(scale) * 1e-6 * float(known.abs().max())):
            for (place, _), target in zip(found, targets, strict=True):
                if _of_pairs(spread_out(values[place], f, target)):
                    name = f.nodes[place].name
                    return Reason(
                        f"softmax attention, but its scores are multiplied with {name}, which varies over queries and "
                        "keys: Attention takes a factor of heads and queries (in q), or of keys (in k)",
                        3,
                    )
            f.multiplied = multiplied
            return tuple(
                Factor(f.indices[p], target, divides) for (p, divides), target in zip(found, targets, strict=True)
            )
    names = " and ".join(f.nodes[place].name for place, _ in found)
    return Reason(f"softmax attention, but the scores are not just multiplied with {names}", 3)


def _change(f: Weights, values: list[torch.Tensor], raw: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """How log(weights) moves where the scores move from 0 by a little."""
    zeros = torch.zeros(f.shape, dtype=torch.float64)
    return centred(f(raw * _STEP, values) - f(zeros, values), soft)


def _alike(one: torch.Tensor, two: torch.Tensor) -> bool:
    return torch.allclose(one, two, rtol=1e-3, atol=1e-5 * float(two.abs().max()))


def _of_pairs(spread: torch.Tensor | None) -> bool:
    """Does it vary over the queries, and over the keys?"""
    return spread is not None and bool((spread != spread[:, :1]).any()) and bool((spread != spread[..., :1]).any())


def _product(
    f: Weights, values: Sequence[torch.Tensor], found: Sequence[tuple[int, bool]], targets: Sequence[int]
) -> torch.Tensor | None:
    result = torch.ones(f.shape, dtype=torch.float64)
    for (place, divides), target in zip(found, targets, strict=True):
        spread = spread_out(values[place], f, target)
        if spread is None:
            return None
        result = result / spread if divides else result * spread
    return result
