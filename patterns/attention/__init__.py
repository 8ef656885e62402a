"""Scaled dot-product attention: softmax(softcap(scale · q·kᵀ) + mask) · v, heads in groups that share k and v.

Source: https://onnx.ai/onnx/operators/onnx__Attention.html; GQA: Ainslie et al., https://arxiv.org/abs/2305.13245;
soft-cap: Gemma 2, https://arxiv.org/abs/2408.00118.

    q ─ layout ─┐                              v ─ layout, repeat ─┐
                ├─ product ─ cap, mask ─ softmax ───────────────── product ─ layout ── y
    k ─ repeat ─┘             anchor ───────────┘

What a region is asked, by running it:
- The elements of q, k and v are numbered and sent to the two products. Where they arrive tells the layouts of the
  tensors, and which KV head serves which query head.
- Raw scores are sent from the first product to the softmax. What becomes of them tells scale and soft-cap.
- Scores of 0 are sent. What the softmax makes of them tells the mask, and which tensor it is.

A mask that is causal at every size that the program admits is not built: it becomes `is_causal`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fxfuse.graph.region import Region
from fxfuse.graph.view import GraphView, fake, op_name
from fxfuse.patterns.attention.factored import not_expressible
from fxfuse.patterns.attention.forms import attention_forms, is_causal_here
from fxfuse.patterns.attention.heads import measure_heads, settle_heads
from fxfuse.patterns.attention.left_beside import left_beside
from fxfuse.patterns.attention.masks import Mask
from fxfuse.patterns.attention.parts import ANCHORS, SDPA, Parts, anchor_of, find_parts, regions
from fxfuse.patterns.attention.scores import measure_scores
from fxfuse.patterns.attention.softmax_weights import follow_scores
from fxfuse.recognise.answers import Found, Input, Proposal, Reason
from fxfuse.recognise.probe import Probe

_NO_REGION = Reason("attention, but there are no q, k and v of three axes or more to compute it from", 2)


class Attention:
    """Multi-head, grouped-query and multi-query attention, fused or written out, with its masks."""

    name = "attention"
    operator = "Attention"
    since_opset = 23
    after = ("rotary_embedding",)
    """It looks through rotary embeddings."""
    signs = ("softmax", "scaled_dot_product_attention")

    def propose(self, view: GraphView, ask: Probe) -> Iterator[Proposal]:
        for node in view.nodes:
            if op_name(node) in ANCHORS or op_name(node) == SDPA:
                readings = find_parts(node)
                if isinstance(readings, Reason):
                    yield Proposal(node, (), missed=readings)
                else:
                    yield Proposal(
                        node, _all_regions(view, readings, ask), best_rank=0, otherwise=_NO_REGION, shares=True
                    )

    def recognise(self, region: Region, ask: Probe) -> Found | Reason:
        readings = find_parts(anchor_of(region))
        if isinstance(readings, Reason):
            return readings
        answers: list[Found | Reason] = []
        for parts in readings:
            if {parts.q, parts.k, parts.v} <= {*region.nodes, *region.sources}:
                try:
                    answers.append(self._read(region, parts, ask))
                except RuntimeError:  # q, k and v do not fit together at sizes that capture lets differ
                    answers.append(_apart(region))
                if isinstance(answers[-1], Found):
                    break
        return max(answers, key=lambda a: float("inf") if isinstance(a, Found) else a.closeness, default=_NO_REGION)

    def _read(self, region: Region, parts: Parts, ask: Probe) -> Found | Reason:
        evaluator = ask.evaluator(0)
        way = None if parts.scores is None else follow_scores(region, parts, evaluator)
        if isinstance(way, Reason):
            return way
        operands = measure_heads(region, parts, way and way[1], evaluator, ask)
        if isinstance(operands, Reason):
            return operands
        heads = settle_heads(region, operands)
        if isinstance(heads, Reason):
            return heads
        scores = measure_scores(region, parts, way, evaluator, ask)
        if isinstance(scores, Reason):
            return scores
        if scores.targets:
            scores = scores.of_those_used()
            heads = settle_heads(
                region, operands, scores.targets, [(region.others[u.index], u.target) for u in scores.users]
            )
            if isinstance(heads, Reason):
                return heads
        why = not_expressible(region, scores.factors, heads, evaluator)
        if why is not None:
            return why
        lower, claim = is_causal_here(region, scores, heads, ask)
        masks = () if lower else scores.masks
        causal = lower or scores.causal
        parameters = {
            "q_num_heads": heads.q_heads,
            "kv_num_heads": heads.kv_heads,
            "head_size": heads.head_size,
            "scale": scores.scale * heads.scale,
            "is_causal": int(causal),
            "softcap": scores.softcap,
            "attn_mask": [Input(3 + m.index) for m in masks],
        }
        if scores.sinks is not None:
            parameters["sinks"] = Input(3 + scores.sinks.index) if isinstance(scores.sinks, Mask) else scores.sinks
        if scores.factors:
            parameters["factors"] = [Input(3 + f.index) for f in scores.factors]
        return Found(
            self.operator,
            parameters,
            attention_forms(region, heads, scores, causal=causal, masks=masks),
            rank=-2 if heads.in_turn else -1 if heads.q_heads == 1 else 0,
            ulp=4.0,
            averaging=True,
            from_leaves=lower or scores.from_leaves,
            masks=tuple((m.index, m.factor) for m in masks),
            claims=(*((claim,) if claim else ()), *left_beside(region, parts)),
        )


def _apart(region: Region) -> Reason:
    """The reason for a region that fails to run once every symbol of its inputs is given a size of its own."""
    sizes = [d for n in region.sources for d in fake(n).shape if isinstance(d, torch.SymInt)]
    symbols = ", ".join(sorted({str(s) for d in sizes for s in d.node.expr.free_symbols}))
    return Reason(
        f"attention, but q, k and v do not fit together where {symbols} differ: name those that have to be equal with "
        "one Dim",
        3,
    )


def _all_regions(view: GraphView, readings: tuple[Parts, ...], ask: Probe) -> Iterator[Region]:
    for parts in readings:
        yield from regions(view, parts, ask)


PATTERN = Attention()
