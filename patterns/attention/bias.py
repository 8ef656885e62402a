"""The masks, biases and sinks of an attention as the one mask that ONNX takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fxfuse.patterns.attention.masks import Mask


@dataclass(frozen=True)
class Fill:
    """How a mask that fills scores with a number is written as a mask that is added to them."""

    part: float = 0.5
    """Which part of the type's minimum hides a key."""
    over: bool = False
    """Does the fill replace what other masks add to that key, instead of coming on top of it?"""
    bounded: bool = False
    """Is the sum of the masks kept at or above the type's minimum, because the model keeps its scores there?"""


def bias(
    masks: tuple[Mask, ...],
    read: Callable[[Mask], torch.Tensor],
    lengths: tuple[int, int],
    dtype: torch.dtype,
    *,
    lower: torch.Tensor | None = None,
    fill: Fill | None = None,
) -> torch.Tensor | None:
    """The masks as one, boolean or of the query's dtype, broadcastable to ``[B, H, Sq, T]``, its last two axes full.

    Args:
        read: the tensor that a mask is, broadcastable to ``[B, H, Sq, T]``.
        lengths: Sq and T.
        dtype: the query's.
        lower: one more mask, boolean ``[Sq, T]``.
        fill: how keys are hidden where the model fills with a number.
    """
    fill = fill or Fill()
    result: torch.Tensor | None = None
    for mask in masks:
        if not mask.finite:
            result = _combine(result, _read(mask, read(mask)))
    filled: torch.Tensor | None = None  # all fills together, so that a key that two masks fill is filled once
    for mask in masks:
        if mask.finite:
            filled = _combine(filled, _read(mask, read(mask)))
    if filled is not None:
        # In a row with no key the fill is the same for all and cancels: the row averages its values, as the model's
        # does.
        number = torch.finfo(dtype).min * fill.part
        floating = result is not None and result.dtype != torch.bool
        under = result if fill.over and floating else torch.zeros_like(filled, dtype=dtype)
        hidden = torch.where(filled, under, number)  # type: ignore[arg-type]
        result = hidden if fill.over and floating else _combine(result, hidden)
    if result is not None and result.dtype not in (torch.bool, dtype):
        narrow = torch.finfo(result.dtype).bits > torch.finfo(dtype).bits or dtype == torch.float16
        # A finite minimum of the wider type would become -inf in the cast, and a row that is masked whole would be nan.
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


def with_sinks(mask: torch.Tensor | None, column: torch.Tensor, lengths: tuple[int, int]) -> torch.Tensor:
    """The mask with one more column, the sinks: ``[B or 1, H, Sq, T + 1]``.

    This is exact if that column's key and value are zeros: its score is then the mask alone, and its value adds
    nothing, so that it only takes its share of the softmax.

    Args:
        column: ``[B or 1, H, 1 or Sq, 1]``, of the query's dtype.
    """
    if mask is None:
        mask = torch.zeros(lengths, dtype=column.dtype, device=column.device)
    elif mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=column.dtype).masked_fill(~mask, -math.inf)
    batch, heads = column.shape[:2]
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    one = isinstance(mask.shape[0], int) and mask.shape[0] == 1  # a symbol is the batch; comparing it would add a guard
    mask = mask.expand(batch if one else -1, heads, -1, -1)
    return torch.cat([mask, column.expand(mask.shape[0], heads, lengths[0], 1)], -1)


def with_one_sink(
    mask: torch.Tensor | None, number: float, lengths: tuple[int, int], like: torch.Tensor
) -> torch.Tensor | None:
    """The same with one number for every row. Without a mask none is needed for 0: a key of zeros scores that by
    itself."""
    if mask is None and number == 0:
        return None
    if mask is None:
        mask = like.new_zeros(lengths)
    if mask.dtype == torch.bool and number != 0:
        mask = like.new_zeros(mask.shape).masked_fill(~mask, -math.inf)
    return torch.nn.functional.pad(mask, (0, 1), value=True if mask.dtype == torch.bool else number)


def _read(mask: Mask, value: torch.Tensor) -> torch.Tensor:
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
