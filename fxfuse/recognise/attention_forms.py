"""The Attention that replaces a region: layouts and attributes."""

from __future__ import annotations

import math
from typing import Any

import torch

from fxfuse.graph.region import Region
from fxfuse.graph.view import fake, op_name
from fxfuse.proof.claims import causal, said_of_causal
from fxfuse.proof.decide import Holds
from fxfuse.recognise.answers import Form
from fxfuse.recognise.attention_bias import Fill, bias, with_sinks
from fxfuse.recognise.heads import Axes, Heads, statically_square
from fxfuse.recognise.masks import Mask
from fxfuse.recognise.questions import Questions, may_change
from fxfuse.recognise.scores import Scores

_BOUNDS = frozenset(["clamp", "clamp_min", "maximum", "max"])
"""What keeps sums of masks from becoming -inf: `torch.max(scores + mask, torch.finfo(…).min)`."""


def attention_forms(
    region: Region, heads: Heads, scores: Scores, *, causal: bool, masks: tuple[Mask, ...]
) -> tuple[Form, ...]:
    """One `fxfuse::attention`: 3-D where no tensor has its heads transposed already, else 4-D.

    How keys that are filled with a number meet another mask shows only in rows that see no key: the proof takes the way
    that says what the model says there.
    """
    ways = [Fill()]
    if any(m.finite for m in masks) and not all(m.finite for m in masks):
        ways = [Fill(), Fill(over=True), Fill(1.0), Fill(1.0, over=True)]
    if masks and any(op_name(n) in _BOUNDS for n in region.nodes):
        # What rows without keys are in half precision no proof asks: they are as the model's code has them.
        half = torch.finfo(fake(region.output).dtype).bits < 32
        ways.insert(0 if half else len(ways), Fill(bounded=True))
    return tuple(_form(region, heads, scores, causal=causal, masks=masks, fill=fill) for fill in ways)


def _form(region: Region, heads: Heads, scores: Scores, *, causal: bool, masks: tuple[Mask, ...], fill: Fill) -> Form:
    flat = "BHSD" not in (heads.q, heads.k, heads.v)
    scale = scores.scale * heads.scale
    attributes: dict[str, float | int] = {}
    if not math.isclose(scale, heads.head_size**-0.5, rel_tol=1e-6):
        attributes["scale"] = scale
    if scores.softcap:
        attributes["softcap"] = scores.softcap
    if flat:
        attributes |= {"q_num_heads": heads.q_heads, "kv_num_heads": heads.kv_heads}
    by_attribute = causal and scores.sinks is None and statically_square(region, heads)
    if by_attribute:
        attributes["is_causal"] = 1
    out = fake(region.output).dtype

    def attention(*inputs: torch.Tensor) -> torch.Tensor:
        # Where the scores are wider than v, all is: the operator has one type.
        kind = torch.promote_types(torch.promote_types(inputs[0].dtype, inputs[1].dtype), inputs[2].dtype)
        q, k, v = (t if t.dtype == kind else t.to(kind) for t in inputs[:3])
        lengths = (_length(q, heads.q), _length(k, heads.k))
        others = inputs[3:]
        triangle = (
            torch.ones(lengths, dtype=torch.bool, device=q.device).tril() if causal and not by_attribute else None
        )
        mask = bias(masks, others, heads.q_heads, lengths, q.dtype, lower=triangle, fill=fill)
        if (sinks := scores.sinks) is not None:
            mask = with_sinks(mask, sinks, others[sinks.index], heads.q_heads, lengths, q.dtype)
            k, v = (torch.nn.functional.pad(t, _one_more(axes)) for t, axes in ((k, heads.k), (v, heads.v)))
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


def is_causal_here(region: Region, scores: Scores, heads: Heads, ask: Questions) -> tuple[bool, str]:
    """Are the masks together the causal one for every size the program admits? Then they need not be built.

    Also: how that was decided, or what it is that makes them none.
    """
    nodes = [region.others[m.index] for m in scores.masks]
    if not nodes or not statically_square(region, heads):
        return False, ""
    if any(map(ask.depends_on_input, nodes)):
        buffers = ask.may_change(nodes)
        return False, f"the mask is kept: {may_change(buffers)}" if buffers else ""
    length: Any = fake(region.sources[0]).shape[2 if heads.q == "BHSD" else 1]
    reader = ask.reader
    row, column = reader.place("query", length), reader.place("key", length)
    masks = []
    for mask, node in zip(scores.masks, nodes, strict=True):
        index = list(reader.index(node, f"{node.name} axis "))
        for place, axis in ((column, -1), (row, -2)):
            if len(index) >= -axis and index[axis].number is None:
                index[axis] = place
        masks.append((node, tuple(index), mask.keeps if fake(node).dtype == torch.bool else mask.factor))
    verdict = causal(reader, masks, row, column, (length, length))
    if isinstance(verdict, Holds):
        return True, f"causal at every length ({verdict.how})"
    return False, said_of_causal(verdict, row, column, reader.size(length))


def _one_more(axes: Axes) -> tuple[int, ...]:
    """The padding that adds one position of zeros."""
    return (0, 0, 0, 0, 0, 1) if axes == "BSHD" else (0, 0, 0, 1)


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
