"""FlexAttention: softmax(score_mod(scale · q·kᵀ), masked by mask_mod) · v, the mods any code on scalars.

Source: Dong et al., https://arxiv.org/abs/2412.05496;
https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html.

A score is read as where(M, cap(a · s) + b, -inf). What it takes to say that with one Attention, in this order:

    attributes       scale, softcap, is_causal (q >= kv, top-left)
    q or k           a factor that varies with head and query is multiplied into q, one that varies with the key into k
    boolean mask     [1 or B, 1 or H, S, T], made of index grids in the graph, once for all layers that share it
    additive mask    the same, where there is a bias; in float32, as flex_attention adds it
    sinks            y · sigmoid(lse - sink) after the call: one more key, of zeros, whose mask is the sink

The algebra over the mod's own operators decides, never a fit to numbers. What it does not cover (a square, a clamp, a
mask that looks at the score) is written out in primitives, and the report says why. `catalogue.md` shows eighty mods
and what each becomes.

On request (`fuse(flex_attention="preview")`) that is one FlexAttention of ai.onnx.preview, its mods a graph attribute;
and at opset 25 (`windows="attributes"`) q - kv <= n is left_window_size, kv - q <= n right_window_size.
"""

from __future__ import annotations

from collections.abc import Iterator

from fxfuse.graph.flex import flex
from fxfuse.graph.region import Region
from fxfuse.graph.view import GraphView
from fxfuse.patterns.flex_attention.block_lists import check_block_mask
from fxfuse.patterns.flex_attention.reading import read, region_of
from fxfuse.patterns.flex_attention.sinks import read_with_sinks, regions_with_sinks
from fxfuse.recognise.answers import Found, Proposal, Reason
from fxfuse.recognise.questions import Questions


class FlexAttention:
    """torch.nn.attention.flex_attention, its score and mask functions, and its log-sum-exp."""

    name = "flex_attention"
    operator = "Attention"
    since_opset = 23

    def propose(self, view: GraphView, ask: Questions) -> Iterator[Proposal]:
        for call, region in regions_with_sinks(view):
            if ask.flex_attention != "preview_only" and check_block_mask(call, ask) is None:
                yield Proposal(call.node, [region], best_rank=0)
        for node in view.nodes:
            call = flex(node)
            if call is None:
                continue
            if (wrong := check_block_mask(call, ask)) is not None:
                yield Proposal(node, [], missed=wrong)
            else:
                for taken in call.used.values():
                    yield Proposal(node, [region_of(view, call, taken)], best_rank=0)

    def recognise(self, region: Region, ask: Questions) -> Found | Reason:
        if len(region.nodes) > 2:
            return read_with_sinks(region, ask)
        return read(region, ask, ask.flex_attention, ask.windows)


PATTERN = FlexAttention()
