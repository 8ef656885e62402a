"""Scaled dot-product attention: softmax(softcap(scale · q·kᵀ) + mask) · v, heads in groups that share k and v.

Source: https://onnx.ai/onnx/operators/onnx__Attention.html; GQA: Ainslie et al., https://arxiv.org/abs/2305.13245;
soft-cap: Gemma 2, https://arxiv.org/abs/2408.00118.

    q ─ layout ─┐                              v ─ layout, repeat ─┐
                ├─ product ─ cap, mask ─ softmax ───────────────── product ─ layout ── y
    k ─ repeat ─┘             anchor ───────────┘

Asked: element numbers sent from q, k and v to the products tell the layouts and which KV head serves which query head;
raw scores sent from the first product to the softmax tell scale and soft-cap; scores of 0 tell the mask, and which
tensor it is. A mask that is causal for every size the program admits is not built.
"""

from __future__ import annotations

from collections.abc import Iterator

from fxfuse.graph.region import Region
from fxfuse.graph.view import GraphView, op_name
from fxfuse.recognise.answers import Found, Input, Proposal, Reason
from fxfuse.recognise.attention_forms import attention_forms, is_causal_here
from fxfuse.recognise.attention_parts import ANCHORS, SDPA, Parts, anchor_of, find_parts, regions
from fxfuse.recognise.heads import measure_heads
from fxfuse.recognise.questions import Questions
from fxfuse.recognise.scores import measure_scores


class Attention:
    """Multi-head, grouped-query and multi-query attention, fused or written out, with its masks."""

    name = "attention"
    operator = "Attention"
    since_opset = 23

    def propose(self, view: GraphView, ask: Questions) -> Iterator[Proposal]:
        for node in view.nodes:
            if op_name(node) in ANCHORS or op_name(node) == SDPA:
                readings = find_parts(node)
                if isinstance(readings, Reason):
                    yield Proposal(node, (), missed=readings)
                else:
                    yield Proposal(node, _all_regions(view, readings, ask), best_rank=0)

    def recognise(self, region: Region, ask: Questions) -> Found | Reason:
        readings = find_parts(anchor_of(region))
        if isinstance(readings, Reason):
            return readings
        answers = [self._read(region, parts, ask) for parts in readings]
        return max(answers, key=lambda a: float("inf") if isinstance(a, Found) else a.closeness)

    def _read(self, region: Region, parts: Parts, ask: Questions) -> Found | Reason:
        evaluator = ask.evaluator(0)
        heads = measure_heads(region, parts, evaluator, ask)
        if isinstance(heads, Reason):
            return heads
        scores = measure_scores(region, parts, evaluator, ask)
        if isinstance(scores, Reason):
            return scores
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
            parameters["sinks"] = Input(3 + scores.sinks.index)
        return Found(
            self.operator,
            parameters,
            attention_forms(region, heads, scores, causal=causal, masks=masks),
            ulp=4.0,
            averaging=True,
            from_leaves=lower or scores.from_leaves,
            masks=tuple((m.index, m.factor) for m in masks),
            claims=(claim,) if claim else (),
        )


def _all_regions(view: GraphView, readings: tuple[Parts, ...], ask: Questions) -> Iterator[Region]:
    for parts in readings:
        yield from regions(view, parts, ask)


PATTERN = Attention()
