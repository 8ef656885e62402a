"""The Attention that replaces a region: layouts, masks and attributes."""

from __future__ import annotations

import math

import torch

from fxfuse.graph.region import Region
from fxfuse.graph.view import fake
from fxfuse.recognise.answers import Form
from fxfuse.recognise.evaluate import MAX_ELEMENTS, CannotEvaluate
from fxfuse.recognise.heads import Axes, Heads, statically_square
from fxfuse.recognise.questions import Questions
from fxfuse.recognise.scores import HARD, Mask, Scores


def attention_form(region: Region, heads: Heads, scores: Scores, *, causal: bool, masks: tuple[Mask, ...]) -> Form:
    """One `fxfuse::attention`: 3-D where no tensor has its heads transposed already, else 4-D."""
    flat = "BHSD" not in (heads.q, heads.k, heads.v)
    scale = scores.scale * heads.scale
    attributes: dict[str, float | int] = {}
    if not math.isclose(scale, heads.head_size**-0.5, rel_tol=1e-6):
        attributes["scale"] = scale
    if scores.softcap:
        attributes["softcap"] = scores.softcap
    if flat:
        attributes |= {"q_num_heads": heads.q_heads, "kv_num_heads": heads.kv_heads}
    square = statically_square(region, heads)
    if causal and square:
        attributes["is_causal"] = 1
    out = fake(region.output).dtype

    def attention(*inputs: torch.Tensor) -> torch.Tensor:
        q, k, v = inputs[:3]
        lengths = (_length(q, heads.q), _length(k, heads.k))
        mask = _mask(masks, inputs[3:], scores.rank, heads.q_heads, lengths, q.dtype)
        if causal and not square:
            lower = torch.ones(lengths, dtype=torch.bool, device=q.device).tril()
            mask = (
                lower
                if mask is None
                else mask & lower
                if mask.dtype == torch.bool
                else mask.masked_fill(~lower, -math.inf)
            )
        operands = [
            _to(t, axes, flat, count)
            for t, axes, count in (
                (q, heads.q, heads.q_heads),
                (k, heads.k, heads.kv_heads),
                (v, heads.v, heads.kv_heads),
            )
        ]
        y = torch.ops.fxfuse.attention(*operands, mask, **attributes)
        y = _from(y, flat, heads)
        return y if y.dtype == out or q.dtype == torch.float64 else y.to(out)

    return attention


def is_causal_here(region: Region, scores: Scores, heads: Heads, ask: Questions) -> bool:
    """Is the one mask the causal one for every size the program admits? Then it need not be built.

    Met at sizes beyond every number in its computation, so that a window does not pass for a causal mask.
    """
    if len(scores.masks) != 1 or not statically_square(region, heads):
        return False
    node = region.others[scores.masks[0].index]
    if ask.depends_on_input(node):
        return False
    try:
        beyond = ask.beyond_literals(node)
        for evaluator in (ask.evaluator(0), ask.evaluator(1), *([beyond] if beyond is not None else [])):
            if torch.Size(evaluator.sizes.shape(node)).numel() > MAX_ELEMENTS // 2:
                return False
            (value,) = ask.leaf_values([node], evaluator, 0)
            if not _is_lower(value, scores.masks[0]):
                return False
    except CannotEvaluate:
        return False
    return True


def _is_lower(value: torch.Tensor, mask: Mask) -> bool:
    if value.dim() < 2 or value.shape[-1] != value.shape[-2]:
        return False
    lower = torch.ones(value.shape[-2:], dtype=torch.bool).tril()
    if value.dtype == torch.bool:
        return bool(((value if mask.keeps else ~value) == lower).all())
    return bool(((value <= HARD) == ~lower).all()) and bool((value.masked_fill(~lower, 0) == 0).all())


def _mask(
    masks: tuple[Mask, ...],
    others: tuple[torch.Tensor, ...],
    rank: int,
    heads: int,
    lengths: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """The masks as one, boolean or of the query's dtype, its last two axes full."""
    result: torch.Tensor | None = None
    for mask in masks:
        value = _to_four_axes(others[mask.index], rank, heads)
        if value.dtype != torch.bool and not mask.keeps:
            value = -value
        if value.dtype == torch.bool:
            value = value if mask.keeps else ~value
            if mask.finite:
                # Rows with no key: the fill is lost against itself, and the row averages, as the model's does.
                value = torch.zeros_like(value, dtype=dtype).masked_fill(~value, torch.finfo(dtype).min / 2)
        if value.dtype == torch.bool:
            if result is None or result.dtype == torch.bool:
                result = value if result is None else result & value
            else:
                result = result.masked_fill(~value, -math.inf)
        elif result is None:
            result = value
        elif result.dtype == torch.bool:
            result = torch.where(result, value, -math.inf)
        else:
            result = result + value
    if result is None:
        return None
    if result.dtype != torch.bool and result.dtype != dtype:
        narrow = torch.finfo(result.dtype).bits > torch.finfo(dtype).bits or dtype == torch.float16
        # A finite minimum of the wider type would become -inf, and a row masked whole would be nan.
        result = result.clamp(min=torch.finfo(dtype).min).to(dtype) if narrow else result.to(dtype)
    last = result.shape[-2:] if result.dim() > 1 else (1, result.shape[-1])
    if str(tuple(last)) != str(tuple(lengths)):
        result = result.expand(*result.shape[:-2], *lengths)
    return result


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


def _length(t: torch.Tensor, axes: Axes) -> int:
    return t.shape[2 if axes == "BHSD" else 1]


def _to(t: torch.Tensor, axes: Axes, flat: bool, heads: int) -> torch.Tensor:
    """To ``[B, S, H·D]`` if flat, else to ``[B, H, S, D]``."""
    if flat:
        return t.flatten(2) if axes == "BSHD" else t
    if axes == "BSX":
        t = torch.unflatten(t, 2, (heads, -1))
    return t if axes == "BHSD" else t.transpose(1, 2)


def _from(y: torch.Tensor, flat: bool, heads: Heads) -> torch.Tensor:
    if flat:
        if heads.out == "BSX":
            return y
        y = torch.unflatten(y, 2, (heads.q_heads, heads.v_head_size))
        return y if heads.out == "BSHD" else y.transpose(1, 2)
    if heads.out == "BHSD":
        return y
    y = y.transpose(1, 2)
    return y.flatten(2) if heads.out == "BSX" else y
