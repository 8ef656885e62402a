"""The Attention that replaces a region: layouts and attributes."""

from __future__ import annotations

import math
from typing import Any

import torch

from fxfuse.graph.region import Region
from fxfuse.graph.view import fake, op_name
from fxfuse.patterns.attention.bias import Fill, bias, with_one_sink, with_sinks
from fxfuse.patterns.attention.factored import multiplied
from fxfuse.patterns.attention.heads import Heads, length_of, statically_square
from fxfuse.patterns.attention.layouts import aligned
from fxfuse.patterns.attention.masks import Mask
from fxfuse.patterns.attention.rearrange import rearranged
from fxfuse.patterns.attention.scores import Scores
from fxfuse.proof.positions.claims import causal, said_of_causal
from fxfuse.proof.positions.decide import Holds
from fxfuse.recognise.answers import Form
from fxfuse.recognise.probe import Probe, may_change

_BOUNDS = frozenset(["clamp", "clamp_min", "maximum", "max"])
"""What keeps sums of masks from becoming -inf: `torch.max(scores + mask, torch.finfo(…).min)`."""


def attention_forms(
    region: Region, heads: Heads, scores: Scores, *, causal: bool, masks: tuple[Mask, ...]
) -> tuple[Form, ...]:
    """One `fxfuse::attention`: 3-D where no tensor has its heads transposed already, else 4-D.

    There are several forms, because a mask that fills with a number can be written as one that is added in several
    ways. They differ only in rows that see no key; the proof takes the first that gives what the model gives there.
    """
    ways = [Fill()]
    if any(m.finite for m in masks) and not all(m.finite for m in masks):
        ways = [Fill(), Fill(over=True), Fill(1.0), Fill(1.0, over=True)]
    if masks and any(op_name(n) in _BOUNDS for n in region.nodes):
        # The proof does not ask what rows without keys give in half precision: the mask is written as the model has it.
        half = torch.finfo(fake(region.output).dtype).bits < 32
        ways.insert(0 if half else len(ways), Fill(bounded=True))
    return tuple(_form(region, heads, scores, causal=causal, masks=masks, fill=fill) for fill in ways)


def _form(region: Region, heads: Heads, scores: Scores, *, causal: bool, masks: tuple[Mask, ...], fill: Fill) -> Form:
    flat = heads.flat
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
        # The operator has one type for all its inputs: where the model's scores are wider than v, everything is cast to
        # that.
        kind = torch.promote_types(torch.promote_types(inputs[0].dtype, inputs[1].dtype), inputs[2].dtype)
        q, k, v = (t if t.dtype == kind else t.to(kind) for t in inputs[:3])
        sizes = heads.lengths(q, k, v)
        lengths = tuple(math.prod(sizes[a] for a in atoms) for atoms in (heads.queries, heads.keys))
        others = inputs[3:]
        triangle = (
            torch.ones(lengths, dtype=torch.bool, device=q.device).tril() if causal and not by_attribute else None
        )

        def read(mask: Mask) -> torch.Tensor:
            return rearranged_mask(others[mask.index], heads, mask.target, sizes)

        mask = bias(masks, read, lengths, q.dtype, lower=triangle, fill=fill)
        q, k = multiplied(q, k, scores.factors, others, heads, sizes)
        operands = [
            rearranged(t, axes, heads.operand(groups, positions, features, flat), sizes)
            for t, axes, groups, positions, features in (
                (q, heads.q, (*heads.groups, *heads.repeats), heads.queries, heads.features[0]),
                (k, heads.k, heads.groups, heads.keys, heads.features[0]),
                (v, heads.v, heads.groups, heads.keys, heads.features[1]),
            )
        ]
        if scores.sinks is not None:
            if isinstance(scores.sinks, Mask):
                column = read(scores.sinks).to(q.dtype)
                column = column.reshape([1] * (4 - column.dim()) + list(column.shape))
                column = column.expand(-1, heads.q_heads, -1, -1)
                mask = with_sinks(mask, column, lengths)
            else:
                mask = with_one_sink(mask, scores.sinks, lengths, q)
            operands[1:] = [torch.nn.functional.pad(t, (0, 0, 0, 1)) for t in operands[1:]]
        y = torch.ops.fxfuse.attention(*operands, mask, **attributes)
        result = heads.operand((*heads.groups, *heads.repeats), heads.queries, heads.features[1], flat)
        y = rearranged(y, result, heads.out, sizes)
        return y if y.dtype == out or q.dtype == torch.float64 else y.to(out)

    return attention


def is_causal_here(region: Region, scores: Scores, heads: Heads, ask: Probe) -> tuple[bool, str]:
    """Are the masks together the causal one at every size that the program admits, so that they need not be built?

    The second value says how that was decided, or why they are not.
    """
    nodes = [region.others[m.index] for m in scores.masks]
    if not nodes or not statically_square(region, heads):
        return False, ""
    if any(map(ask.depends_on_input, nodes)):
        buffers = ask.may_change(nodes)
        return False, f"the mask is kept: {may_change(buffers)}" if buffers else ""
    length: Any = length_of(region.sources[0], heads.q, heads.queries)
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


def rearranged_mask(t: torch.Tensor, heads: Heads, target: int, sizes: dict[str, Any]) -> torch.Tensor:
    """What broadcasts against a shape of the scores as what broadcasts against ``[B, H, Sq, T]``."""
    have = aligned(t.shape, heads.masks[target])
    want = (heads.batch, (*heads.groups, *heads.repeats), heads.queries, heads.keys)
    return rearranged(t, have, want, sizes, whole=False)
