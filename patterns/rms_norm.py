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

from fxfuse.graph.region import Region, between
from fxfuse.graph.view import ARITHMETIC, CAST, LAYOUT, ROOTS, GraphView, argument, fake, is_float, op_name, static
from fxfuse.recognise.answers import Form, Found, Input, Proposal, Reason
from fxfuse.recognise.evaluate import draw, generator
from fxfuse.recognise.literals import snap
from fxfuse.recognise.questions import Questions
from fxfuse.recognise.walk import backward, forward

_ANCHORS = frozenset({"rsqrt", "sqrt", "rms_norm", "linalg_vector_norm", "norm"})
_SCALED = 2
_WHOLE = _SCALED + 1
_DOUBLE = 11
"""`onnx.TensorProto.DOUBLE`: the default stash_type would round a float64 model to float32."""


def _walked(name: str) -> bool:
    return name in ARITHMETIC or name in CAST or name in LAYOUT or name in ROOTS


class RMSNorm:
    """Root mean square normalisation over the last axis, with or without a scale."""

    name = "rms_norm"
    operator = "RMSNormalization"
    since_opset = 23

    def propose(self, view: GraphView, ask: Questions) -> Iterator[Proposal]:
        for node in view.nodes:
            if op_name(node) in _ANCHORS or _is_root_power(node):
                yield Proposal(node, self._around(view, node), best_rank=_WHOLE)

    def _around(self, view: GraphView, anchor: Node) -> Iterator[Region]:
        """Outputs after the root, nearest first, each with the nearest inputs of its shape before it."""
        sources = [anchor, *backward(view, anchor, _walked, depth=8, limit=24)]
        if op_name(anchor) == "rms_norm":
            sources = sources[1:]
        for output in forward(view, anchor, _walked, depth=8, limit=24):
            if not is_float(output) or fake(output).dim() < 1:
                continue
            tried = 0
            for source in sources:
                if source is output or not is_float(source) or not view.same_shape(source, output):
                    continue
                region = between(view, output, [source], _walked, limit=40)
                if region is not None and anchor in region.nodes:
                    tried += 1
                    yield region
                if tried == 4:
                    break

    def recognise(self, region: Region, ask: Questions) -> Found | Reason:
        (x,) = region.sources
        size = static(fake(x).shape[-1])
        if size is None or size < 2:
            return Reason("the normalised axis has no fixed size")
        if not all(is_float(n) for n in region.others):
            return Reason("it also reads tensors that are not floating point")
        scales, draws = [], []
        for seed in (1, 2):
            f, others = _function(region, ask, seed)
            big = draw(x, f.evaluator, generator(seed + 10)) * 1e4
            ratio = f(big) * big.square().mean(-1, keepdim=True).sqrt() / big
            rows = ratio.reshape(-1, size)
            if not torch.isfinite(rows).all():
                return Reason("not a normalisation")
            if not torch.allclose(rows, rows[:1].expand_as(rows), rtol=1e-6):
                return self._near(f, x, size)
            scales.append(rows[0])
            draws.append(others)
        scale = _scale_source(region, scales, draws)
        if isinstance(scale, Reason):
            return scale
        epsilon = _epsilon(f, x, scales[-1])
        if isinstance(epsilon, Reason):
            return epsilon
        epsilon = snap(epsilon, region)
        index, constant = scale
        parameters = {"epsilon": epsilon, "scale": Input(1 + index) if index is not None else constant}
        position = None if index is None else 1 + index
        forms = _forms(region, position, constant, epsilon)
        # Of two regions of equal standing the one that needs no casts around it is the better.
        rank = (_SCALED if position is not None else 0) + (fake(x).dtype == fake(region.output).dtype)
        return Found(self.operator, parameters, forms, rank=rank)

    def _near(self, f: _Function, x: Node, size: int) -> Reason:
        """Scale-invariant per position, so a normalisation of some kind: which property fails?"""
        values = draw(x, f.evaluator, generator(5)) * 1e4
        ratio = f(values) / (values / values.square().mean(-1, keepdim=True).sqrt())
        scaled = f(values * 3) / (values / values.square().mean(-1, keepdim=True).sqrt())
        if not torch.allclose(ratio, scaled, rtol=1e-5) or not torch.isfinite(ratio).all():
            return Reason("not a normalisation")
        by_position = ratio / ratio[..., :1]
        if torch.allclose(by_position, by_position.reshape(-1, size)[:1].expand_as(by_position), rtol=1e-6):
            return Reason("RMSNorm but for its size, which is not the root mean square over the last axis alone", 2)
        centred = values - values.mean(-1, keepdim=True)
        flat = f(values) / (centred / centred.square().mean(-1, keepdim=True).sqrt())
        if torch.allclose(flat, flat.reshape(-1, size)[:1].expand_as(flat), rtol=1e-5):
            return Reason("it subtracts the mean first: a LayerNorm, not an RMSNorm", 3)
        return Reason("RMSNorm but for the weight, which varies over the positions (a gate?)", 2)


class _Function:
    """The region as a function of x alone."""

    def __init__(self, region: Region, ask: Questions, seed: int) -> None:
        self.region = region
        self.evaluator = ask.evaluator(0)
        gen = generator(seed)
        self.others = [draw(n, self.evaluator, gen).abs() + 0.5 for n in region.others]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.evaluator.region(self.region, [x, *self.others])


def _function(region: Region, ask: Questions, seed: int) -> tuple[_Function, list[torch.Tensor]]:
    f = _Function(region, ask, seed)
    return f, f.others


def _scale_source(
    region: Region, scales: list[torch.Tensor], draws: list[list[torch.Tensor]]
) -> tuple[int | None, float] | Reason:
    """Which tensor the scale is; or the constant it is, where no tensor is."""
    for index in range(len(region.others)):
        if all(o[index].numel() == s.numel() and torch.allclose(o[index].reshape(-1), s, rtol=1e-6)
               for o, s in zip(draws, scales, strict=True)):  # fmt: skip
            return (index, 1.0) if len(region.others) == 1 else Reason("it reads tensors besides its scale", 2)
    constant = scales[0][0].item()
    if region.others or not all(torch.allclose(s, torch.full_like(s, constant), rtol=1e-6) for s in scales):
        return Reason("RMSNorm, but its weight is none of the tensors it reads", 2)
    return None, snap(constant, region)


def _epsilon(f: _Function, x: Node, scale: torch.Tensor) -> float | Reason:
    """Solve (x·scale/y)² - mean(x²) for tiny x, where epsilon is not."""
    found = []
    for magnitude in (1e-3, 1e-4):
        tiny = draw(x, f.evaluator, generator(7)) * magnitude
        measured = (tiny * scale / f(tiny)).square() - tiny.square().mean(-1, keepdim=True)
        epsilon = measured.mean().item()
        if not torch.allclose(measured, torch.full_like(measured, epsilon), rtol=1e-3, atol=1e-12):
            return Reason(
                "RMSNorm, but epsilon is not added to the mean square under the root (outside it, or clamped)", 3
            )
        found.append(epsilon)
    if abs(found[0] - found[1]) > 1e-3 * abs(found[1]) + 1e-12 or found[1] < -1e-15:
        return Reason("RMSNorm, but epsilon is not added to the mean square under the root (outside it, or clamped)", 3)
    return max(found[1], 0.0)


def _forms(region: Region, position: int | None, constant: float, epsilon: float) -> tuple[Form, ...]:
    """In x's own dtype if it is the scale's and the result's too; else float32 inside, cast back."""
    out = fake(region.output).dtype
    kinds = {fake(n).dtype for n in region.inputs} | {out}

    def form(inside: torch.dtype) -> Form:
        def rms_norm(*inputs: torch.Tensor) -> torch.Tensor:
            x = inputs[0]
            exact = x.dtype == torch.float64
            kind = x.dtype if exact else inside
            if position is None:
                scale = torch.full((x.shape[-1],), constant, dtype=kind, device=x.device)
            else:
                scale = inputs[position].reshape(-1) if inputs[position].dim() != 1 else inputs[position]
            stash = {"stash_type": _DOUBLE} if exact else {}
            y: torch.Tensor = torch.ops.fxfuse.rms_norm(_cast(x, kind), _cast(scale, kind), epsilon=epsilon, **stash)
            return y if exact else _cast(y, out)

        return rms_norm

    wide: Callable[..., torch.Tensor] = form(torch.float32)
    return (form(out), wide) if len(kinds) > 1 or out != torch.float32 else (wide,)


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _is_root_power(node: Node) -> bool:
    return op_name(node) == "pow" and argument(node, "exponent") in (0.5, -0.5)


PATTERN = RMSNorm()
