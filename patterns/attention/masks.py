"""Which tensors mask or bias the scores, and how: read off the bias that they give to scores of 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product as choices

import torch

from fxfuse.patterns.attention.softmax_weights import Weights, centred
from fxfuse.recognise.answers import Reason

HARD = -600.0
"""A bias below this masks: exp of it is 0 in every dtype."""


@dataclass(frozen=True)
class Mask:
    """One tensor that masks or biases the scores."""

    index: int
    """Which of `Region.others` it is."""
    target: int
    """Number of the shape that it broadcasts against, among those that the scores take on their way: ``[B·H, Sq, T]``,
    ``[B, H, Sq, T]``, …"""
    keeps: bool = True
    """A boolean mask is True where a key is kept (False: where it is dropped)."""
    factor: float = 1.0
    """What a bias is multiplied with when it is added."""
    finite: bool = False
    """Does a boolean mask fill with a large finite number, so that a row with no key averages instead of being 0?"""


@dataclass(frozen=True)
class Explained:
    """A bias taken apart: it is the sum of these masks."""

    masks: tuple[Mask, ...]
    total: torch.Tensor
    """Their sum, -inf where a key is masked, in the shape of the scores."""
    idle: tuple[int, ...]
    """Places of the tensors that shift no score against another: they may be sinks."""


def explain(f: Weights, values: list[torch.Tensor], bias: torch.Tensor, soft: torch.Tensor) -> Explained | Reason:
    """Which tensors, read as added or boolean masks, give this bias?

    Args:
        f: log(weights) as a function of scores and these tensors.
        values: what the tensors were drawn as, in the order of `f.nodes`.
        bias: log(weights) at scores of 0.
        soft: where a key is kept.
    """
    added: dict[int, Mask] = {}
    toggles: list[int] = []
    idle: list[int] = []
    for place, value in enumerate(values):
        if value.dtype == torch.bool:
            toggles.append(place)
            continue
        found = _added(f, values, place, bias, soft)
        if isinstance(found, Reason):
            return found
        if found is None:
            idle.append(place)
        else:
            added[place] = found
    base = torch.zeros(f.shape, dtype=torch.float64)
    for place, mask in added.items():
        spread = spread_out(values[place], f, mask.target)
        assert spread is not None
        base = base + mask.factor * spread
    wanted = centred(bias, soft)
    reachable = soft.any(-1, keepdim=True)
    for ways in choices(choices(range(len(f.targets)), (True, False)), repeat=len(toggles)):
        total = base
        for place, (target, keeps) in zip(toggles, ways, strict=True):
            spread = spread_out(values[place], f, target)
            if spread is None:
                break
            total = total.masked_fill(~spread if keeps else spread, float("-inf"))
        else:
            kept = total > total.amax(-1, keepdim=True) + HARD
            if torch.equal(kept & reachable, soft) and torch.allclose(
                centred(total, soft), wanted, rtol=1e-7, atol=1e-7
            ):
                total = torch.where(kept, total, float("-inf"))
                masks = dict(added)
                for place, (target, keeps) in zip(toggles, ways, strict=True):
                    mask = Mask(f.indices[place], target, keeps)
                    masks[place] = replace(mask, finite=_averages(f, values, place, keeps))
                return Explained(tuple(masks[p] for p in sorted(masks)), total, tuple(idle))
    return Reason(
        "softmax attention, but its mask is neither added to the scores nor a boolean that keeps or drops keys", 3
    )


def spread_out(value: torch.Tensor, f: Weights, target: int, *, rows: bool = False) -> torch.Tensor | None:
    """The tensor over all scores, broadcast against this shape of theirs; None where it does not broadcast.

    `rows`: it has one element for each row, and is returned as ``[N, S, 1]``.
    """
    shape, places = f.targets[target].shape, f.targets[target].places
    wanted = shape
    if rows:
        axis = _key_axis(shape, places)
        if axis is None:
            return None
        wanted = (*shape[:axis], 1, *shape[axis + 1 :])
    try:
        spread = value.expand(wanted).expand(shape).reshape(-1)[places]
    except RuntimeError:
        return None
    return spread[..., :1] if rows else spread


def _key_axis(shape: tuple[int, ...], places: torch.Tensor) -> int | None:
    """The axis of this shape that counts the keys and nothing else; None if there is none."""
    step = int(places[0, 0, -1] - places[0, 0, 0])
    for axis, size in enumerate(shape):
        unit = torch.Size(shape[axis + 1 :]).numel()
        if size == places.shape[-1] and step == unit * (size - 1):
            return axis
    return None


def _added(
    f: Weights, values: Sequence[torch.Tensor], place: int, bias: torch.Tensor, soft: torch.Tensor
) -> Mask | Reason | None:
    """The tensor at `place` as a mask that is added, times a number; None where it shifts no score against another."""
    step = torch.randn(values[place].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(44)) * 0.1
    moved = [v + step if i == place else v for i, v in enumerate(values)]
    change = centred(f(torch.zeros(f.shape, dtype=torch.float64), moved) - bias, soft)
    if not change.isfinite().all():
        return Reason("softmax attention, but a mask that is added decides which keys there are", 3)
    if change.abs().max() < 1e-9:
        return None
    for target in range(len(f.targets)):
        spread = spread_out(step, f, target)
        if spread is None:
            continue
        known = centred(spread, soft)
        factor = float((change * known).sum() / (known * known).sum())
        if torch.allclose(change, factor * known, rtol=1e-6, atol=1e-9):
            near = round(factor)
            return Mask(f.indices[place], target, factor=float(near) if abs(factor - near) < 1e-6 else factor)
    return Reason("softmax attention, but one of the tensors beside q, k and v is not just added to the scores", 3)


def _averages(f: Weights, values: list[torch.Tensor], place: int, keeps: bool) -> bool:
    """Does a row with no key kept average over all of them (a finite fill), or is it undefined?"""
    dropped = [torch.full_like(v, not keeps) if i == place else v for i, v in enumerate(values)]
    return bool(f(torch.zeros(f.shape, dtype=torch.float64), dropped).isfinite().any())
