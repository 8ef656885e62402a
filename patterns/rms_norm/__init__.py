"""RMSNorm: y = x / sqrt(mean(x², last axis) + epsilon) · scale.

Source: https://onnx.ai/onnx/operators/onnx__RMSNormalization.html; Zhang & Sennrich, https://arxiv.org/abs/1910.07467.

    x ──┬────────────────────────────(·)──(·)── y        anchor: the root
        └─ square ─ mean ─ + eps ─ root ┘    └─ scale

Asked of a region from x to y: for large x, is f(x)·rms(x)/x one vector for all positions? That is the scale, and some
tensor of the region has to be it. For tiny x, solve for epsilon. Nothing is read off the spelling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.fx import Node

from fxfuse.graph.region import Region
from fxfuse.graph.view import ARITHMETIC, CAST, LAYOUT, ROOTS, GraphView, argument, fake, is_float, op_name, static
from fxfuse.ops.arguments import DOUBLE
from fxfuse.patterns.rms_norm.near_norms import near_miss, of_another
from fxfuse.proof.evaluate import draw, generator
from fxfuse.recognise.answers import Form, Found, Input, Proposal, Reason
from fxfuse.recognise.epsilon import measure_epsilon
from fxfuse.recognise.literals import snap
from fxfuse.recognise.normalisation import (
    NormFunction,
    Scale,
    cast,
    precisely,
    regions_around,
    scale_source,
)
from fxfuse.recognise.probe import Probe
from fxfuse.recognise.walk import backward

_ANCHORS = frozenset({"rsqrt", "sqrt", "rms_norm", "linalg_vector_norm", "norm", "std"})
_SPREADS = frozenset({"var", "std", "var_mean", "std_mean"})
"""What makes it a LayerNorm, which is to be said."""
_SCALED, _PLAIN = 4, 2
_WHOLE = _SCALED + 1


def _walked(name: str) -> bool:
    return name in ARITHMETIC or name in CAST or name in LAYOUT or name in ROOTS or name in _SPREADS


class RMSNorm:
    """Root mean square normalisation over the last axis, with or without a scale."""

    name = "rms_norm"
    operator = "RMSNormalization"
    since_opset = 23
    signs = ("rms_norm", "rsqrt")

    def propose(self, view: GraphView, ask: Probe) -> Iterator[Proposal]:
        for node in view.nodes:
            if op_name(node) in _ANCHORS or _is_root_power(node):
                sources = [node, *backward(view, node, _walked, depth=8, limit=24)]
                if op_name(node) == "rms_norm":
                    sources = sources[1:]
                regions = regions_around(view, node, sources, _walked, 8, 4)
                yield Proposal(node, regions, of_another(view, node), best_rank=_WHOLE)

    def recognise(self, region: Region, ask: Probe) -> Found | Reason:
        (x,) = region.sources
        if not all(is_float(n) for n in region.others):
            return Reason("it also reads tensors that are not floating point")
        size = static(fake(x).shape[-1])
        if size is None or size < 2:
            return near_miss(NormFunction(region, ask, 1), x)
        scales = []
        functions = [NormFunction(region, ask, seed) for seed in (1, 2)]
        for seed, f in enumerate(functions):
            big = draw(x, f.evaluator, generator(seed + 10)) * 1e4
            ratio = f(big) * big.square().mean(-1, keepdim=True).sqrt() / big
            rows = ratio.reshape(-1, size)
            if not torch.isfinite(rows).all():
                return Reason("not a normalisation")
            if not torch.allclose(rows, rows[:1].expand_as(rows), rtol=1e-6):
                return near_miss(f, x)
            scales.append(precisely(f, big, rows[0]))
        scale = scale_source(region, functions, scales)
        if isinstance(scale, Reason):
            return scale
        measured = measure_epsilon(f, x, scales[-1], ask)
        if isinstance(measured, Reason):
            return measured
        epsilon = measured.value
        if measured.floor is None:
            epsilon = snap(epsilon, region, tolerance=1e-6, known=f.numbers)
        known = scale.offset if scale.position is None else Input(scale.position)
        parameters = {"epsilon": epsilon, "scale": known}
        forms = _forms(region, scale, epsilon)
        # Of two regions of equal standing the one that needs no casts around it is the better.
        rank = (_SCALED if scale.position is not None else _PLAIN if scale.offset == 1 else 0) + (
            fake(x).dtype == fake(region.output).dtype
        )
        return Found(self.operator, parameters, forms, rank=rank, from_leaves=f.from_leaves, floor=measured.floor)


def _forms(region: Region, scale: Scale, epsilon: float) -> tuple[Form, ...]:
    """In x's own dtype if it is the scale's and the result's too; else float32 inside, cast back."""
    out = fake(region.output).dtype
    kinds = {fake(n).dtype for n in region.inputs} | {out}

    def form(inside: torch.dtype) -> Form:
        def rms_norm(*inputs: torch.Tensor) -> torch.Tensor:
            x = inputs[0]
            exact = x.dtype == torch.float64
            kind = x.dtype if exact else inside
            weight = scale(inputs, kind)
            stash = {"stash_type": DOUBLE} if exact else {}
            y: torch.Tensor = torch.ops.fxfuse.rms_norm(cast(x, kind), weight, epsilon=epsilon, **stash)
            return y if exact else cast(y, out)

        return rms_norm

    wide: Callable[..., torch.Tensor] = form(torch.float32)
    return (form(out), wide) if len(kinds) > 1 or out != torch.float32 else (wide,)


def _is_root_power(node: Node) -> bool:
    return op_name(node) == "pow" and argument(node, "exponent") in (0.5, -0.5)


PATTERN = RMSNorm()
