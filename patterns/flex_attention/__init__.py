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

What a caller may choose: `FlexAttention` has options of its own, which every door takes by keyword. On request
(`flex_attention="preview"`) that is one FlexAttention of ai.onnx.preview, its mods a graph attribute; and at opset 25
(`windows="attributes"`) q - kv <= n is left_window_size, kv - q <= n right_window_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from fxfuse.graph.higher_order import register_higher_order
from fxfuse.graph.region import Region
from fxfuse.graph.view import GraphView
from fxfuse.ops.registry import PARTS
from fxfuse.patterns.flex_attention.block_lists import check_block_mask
from fxfuse.patterns.flex_attention.calls import flex, separate_outputs
from fxfuse.patterns.flex_attention.capturing.capture import flex_capture
from fxfuse.patterns.flex_attention.evaluated import FLEX
from fxfuse.patterns.flex_attention.options import WINDOW_OPSET, BlockMasks, FlexCalls, Windows
from fxfuse.patterns.flex_attention.reading import read, region_of
from fxfuse.patterns.flex_attention.reconstruct import reconstruct
from fxfuse.patterns.flex_attention.sinks import read_with_sinks, regions_with_sinks
from fxfuse.recognise.answers import Found, Proposal, Reason
from fxfuse.recognise.declared import check_declared, option
from fxfuse.recognise.probe import Probe

register_higher_order(torch.ops.higher_order.flex_attention, FLEX)


@dataclass(frozen=True)
class FlexAttention:
    """torch.nn.attention.flex_attention, its score and mask functions, and its log-sum-exp.

    FlexAttention(windows="attributes", calls="preview", block_mask="reconstruct")

    Each option is a keyword of every door too, and of the command line; `calls` is called ``flex_attention`` there.

    Raises:
        FxfuseError: an option has a value that it does not know.
    """

    name = "flex_attention"
    operator = "Attention"
    since_opset = 23
    after = ("attention",)

    windows: Windows = option(
        Windows,
        help="what windows in flex_attention become: part of the mask, or attributes of Attention "
        f"(opset {WINDOW_OPSET})",
        since={"attributes": WINDOW_OPSET},
    )
    """What ``q - kv <= n`` in a mod becomes. ``"mask"``: a part of the Attention's mask. ``"attributes"``:
    `left_window_size` and `right_window_size`, which need opset 25 and a runtime that has it; ONNX Runtime's CPU
    kernels of Attention end at 24."""
    calls: FlexCalls = option(
        FlexCalls,
        keyword="flex_attention",
        help="what a call of flex_attention becomes: Attention or primitives (standard), FlexAttention of "
        "ai.onnx.preview instead of primitives (preview) or of both (preview_only)",
    )
    """What a call of flex_attention becomes. ``"standard"``: one Attention, or primitives where its mods allow none.
    ``"preview"``: FlexAttention of ai.onnx.preview instead of the primitives, the mods in its `score_mod`.
    ``"preview_only"``: instead of Attention too. No runtime has that operator yet; onnx's reference evaluator runs it
    once `onnx.inliner` has inlined its body."""
    block_mask: BlockMasks = option(
        BlockMasks,
        help="what of a BlockMask counts in flex_attention: lists that its function does not say are refused (check), "
        "lists and function count (reconstruct), or the function alone (assume_mask_mod)",
    )
    """What of a `BlockMask` counts. ``"check"``: block lists have to follow from the mask function, or the call is
    left, and reported. ``"reconstruct"``: where they do not, both count, as in the compiled kernel.
    ``"assume_mask_mod"``: the function counts, as in the eager one."""

    def __post_init__(self) -> None:
        check_declared(self)

    def capturing(self) -> AbstractContextManager[None]:
        """`fxfuse.flex_capture`."""
        return flex_capture()

    def prepare(self, program: ExportedProgram, ask: Probe) -> None:
        """One call for each output that is read; where block lists count, mask functions that say what they do."""
        separate_outputs(list(program.graph.nodes))
        if self.block_mask == "reconstruct":
            reconstruct(program, ask)

    def propose(self, view: GraphView, ask: Probe) -> Iterator[Proposal]:
        for call, region in regions_with_sinks(view):
            if self.calls != "preview_only" and check_block_mask(call, ask, self.block_mask) is None:
                yield Proposal(call.node, [region], best_rank=0)
        for node in view.nodes:
            call = flex(node)
            if call is None:
                continue
            if (wrong := check_block_mask(call, ask, self.block_mask)) is not None:
                yield Proposal(node, [], missed=wrong)
            else:
                for taken in call.used.values():
                    yield Proposal(node, [region_of(view, call, taken)], best_rank=0)

    def recognise(self, region: Region, ask: Probe) -> Found | Reason:
        if len(region.nodes) > 2:
            return read_with_sinks(region, ask)
        return read(region, ask, self.calls, self.windows)

    def variants(self, calls: Sequence[Node]) -> list[FlexAttention]:
        """With which options these calls of a fused program may have been made: those whose operators it holds."""
        sides = ("left_window_size", "right_window_size")
        bounded = any(n.kwargs.get(side, -1) != -1 for n in calls for side in sides)
        kept = any(n.target in PARTS for n in calls)
        windows: list[Windows] = ["attributes", "mask"] if bounded else ["mask"]
        becomes: list[FlexCalls] = ["preview", "preview_only", "standard"] if kept else ["standard"]
        return [replace(self, windows=one, calls=other) for one in windows for other in becomes]


PATTERN = FlexAttention()
