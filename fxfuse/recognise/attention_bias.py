"""The masks, biases and sinks of an attention as the one mask that ONNX takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fxfuse.recognise.masks import Mask


@dataclass(frozen=True)
class Fill:
    """How a fill is said by adding."""

    part: float = 0.5
    """Which part of the type's minimum hides a key."""
    over: bool = False
    """In the place of what other masks add, instead of on top of it."""
    bounded: bool = False
    """What the masks add is never below the type's minimum: the model says so of its scores."""


def bias(
    masks: tuple[Mask, ...],
    others: tuple[torch.Tensor, ...],
    heads: int,
    lengths: tuple[int, int],
    dtype: torch.dtype,
    *,
    lower: torch.Tensor | None = None,
    fill: Fill | None = None,
) -> torch.Tensor | None:
    """The masks as one, boolean or of the query's dtype, broadcastable to ``[B, H, Sq, T]``, its last two axes full.

    Args:
        others: what `Mask.index` counts in.
        lengths: Sq and T.
        dtype: the query's.
        lower: one more mask, boolean ``[Sq, T]``.
        fill: how keys are hidden where the model fills with a number.
    """
    fill = fill or Fill()
    result: torch.Tensor | None = None
    for mask in masks:
        if not mask.finite:
            result = _combine(result, _read(mask, others[mask.index], heads, dtype))
    filled: torch.Tensor | None = None  # what is filled twice is filled once
    for mask in masks:
        if mask.finite:
            filled = _combine(filled, _read(mask, others[mask.index], heads, dtype))
    if filled is not None:
        # Rows with no key: the fill is lost against itself, and the row averages, as the model's does.
        number = torch.finfo(dtype).min * fill.part
        floating = result is not None and result.dtype != torch.bool
        under = result if fill.over and floating else torch.zeros_like(filled, dtype=dtype)
        hidden = torch.where(filled, under, number)  # type: ignore[arg-type]
        result = hidden if fill.over and floating else _combine(result, hidden)
    if result is not None and result.dtype not in (torch.bool, dtype):
        narrow = torch.finfo(result.dtype).bits > torch.finfo(dtype).bits or dtype == torch.float16
        # A finite minimum of the wider type would become -inf, and a row masked whole would be nan.
        result = result.clamp(min=torch.finfo(dtype).min).to(dtype) if narrow else result.to(dtype)
    if fill.bounded and result is not None and result.dtype != torch.bool:
        result = result.clamp(min=torch.finfo(dtype).min)
    if lower is not None:
        result = _combine(result, lower)
    if result is None:
        return None
    last = result.shape[-2:] if result.dim() > 1 else (1, result.shape[-1])
    if str(tuple(last)) != str(tuple(lengths)):
        result = result.expand(*result.shape[:-2], *lengths)
    return result


def with_sinks(
    mask: torch.Tensor | None,
    sinks: Mask,
    value: torch.Tensor,
    heads: int,
    lengths: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The mask with one more column, the sinks: ``[B or 1, H, Sq, T + 1]``.

    Exact where that column's key and value are zeros: its score is the mask alone, and it adds nothing to the result
    but its share.
    """
    if mask is None:
        mask = torch.zeros(lengths, dtype=dtype, device=value.device)
    elif mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)
    column = _read(sinks, value, heads, dtype).to(dtype)
    batch = column.shape[0] if column.dim() == 4 else 1
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    mask = mask.expand(batch, heads, -1, -1) if mask.shape[0] == 1 else mask.expand(-1, heads, -1, -1)
    return torch.cat([mask, column.expand(mask.shape[0], heads, lengths[0], 1)], -1)


def _read(mask: Mask, value: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
    value = _to_four_axes(value, mask.rank, heads)
    if value.dtype != torch.bool:
        return value if mask.factor == 1 else value * mask.factor
    return value if mask.keeps else ~value


def _combine(one: torch.Tensor | None, two: torch.Tensor) -> torch.Tensor:
    if one is None:
        return two
    if one.dtype == two.dtype == torch.bool:
        return one & two
    if two.dtype == torch.bool:
        return one.masked_fill(~two, -math.inf)
    if one.dtype == torch.bool:
        return torch.where(one, two, -math.inf)
    return one + two


def _to_four_axes(mask: torch.Tensor, rank: int, heads: int) -> torch.Tensor:
    """From broadcasting against scores of this rank to broadcasting against ``[B, H, Sq, T]``."""
    if rank == 3 and mask.dim() == 3:
        if mask.shape[0] == 1:
            return mask.unsqueeze(0)
        return torch.unflatten(mask, 0, (-1, heads))
    if rank == 5 and mask.dim() > 3:
        while mask.dim() < 5:
            mask = mask.unsqueeze(0)
        if mask.shape[1] == 1:
            return (
                mask.squeeze(1)
                if mask.shape[2] == 1
                else mask.expand(-1, heads // mask.shape[2], -1, -1, -1).flatten(1, 2)
            )
        return mask.expand(-1, -1, heads // mask.shape[1], -1, -1).flatten(1, 2)
    return mask
