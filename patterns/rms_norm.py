"""RMSNorm: y = x / sqrt(mean(x², last axis) + epsilon) · scale.

Source: https://onnx.ai/onnx/operators/onnx__RMSNormalization.html; Zhang & Sennrich, https://arxiv.org/abs/1910.07467.

    x ──┬────────────────────────────(·)──(·)── y        anchor: the root
        └─ square ─ mean ─ + eps ─ root ┘    └─ scale

Asked of a region from x to y: for large x, is f(x)·rms(x)/x one vector for all positions? That is the scale, and some
tensor of the region has to be it. For tiny x, solve for epsilon. Nothing is read off the spelling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
_SCALED, _PLAIN = 4, 2
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
        scales = []
        functions = [_Function(region, ask, seed) for seed in (1, 2)]
        for seed, f in enumerate(functions):
            big = draw(x, f.evaluator, generator(seed + 10)) * 1e4
            ratio = f(big) * big.square().mean(-1, keepdim=True).sqrt() / big
            rows = ratio.reshape(-1, size)
            if not torch.isfinite(rows).all():
                return Reason("not a normalisation")
            if not torch.allclose(rows, rows[:1].expand_as(rows), rtol=1e-6):
                return self._near(f, x, size)
            scales.append(rows[0])
        scale = _scale_source(region, functions, scales)
        if isinstance(scale, Reason):
            return scale
        epsilon = _epsilon(f, x, scales[-1])
        if isinstance(epsilon, Reason):
            return epsilon
        epsilon = snap(epsilon, region)
        known = scale.offset if scale.position is None else Input(scale.position)
        parameters = {"epsilon": epsilon, "scale": known}
        forms = _forms(region, scale, epsilon)
        # Of two regions of equal standing the one that needs no casts around it is the better.
        rank = (_SCALED if scale.position is not None else _PLAIN if scale.offset == 1 else 0) + (
            fake(x).dtype == fake(region.output).dtype
        )
        return Found(self.operator, parameters, forms, rank=rank, from_leaves=f.from_leaves)

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
        size = fake(region.sources[0]).shape[-1]
        # An epsilon or a 1 held in a tensor keeps its value; whatever may be the scale is drawn.
        held = [n for n in region.others if fake(n).shape[-1:] != (size,) and not ask.depends_on_input(n)]
        values = dict(zip(held, ask.leaf_values(held, self.evaluator, seed), strict=True)) if held else {}
        self.others = [values[n] if n in values else draw(n, self.evaluator, gen).abs() + 0.5 for n in region.others]
        self.free = [i for i, n in enumerate(region.others) if n not in values]
        self.from_leaves = bool(held)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.evaluator.region(self.region, [x, *self.others])


@dataclass(frozen=True)
class _Scale:
    """factor · (the tensor at `position` of the inputs) + offset; the constant `offset` where there is no tensor."""

    position: int | None
    factor: float
    offset: float

    def __call__(self, inputs: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
        if self.position is None:
            return torch.full((inputs[0].shape[-1],), self.offset, dtype=dtype, device=inputs[0].device)
        scale = _cast(inputs[self.position], dtype)
        scale = scale.reshape(-1) if scale.dim() != 1 else scale
        scale = scale if self.factor == 1 else scale * self.factor
        return scale if self.offset == 0 else scale + self.offset


def _scale_source(region: Region, f: list[_Function], scales: list[torch.Tensor]) -> _Scale | Reason:
    """Which tensor the scale is, or a multiple of and a constant more than; or the constant it is."""
    if len(f[0].free) > 1:
        return Reason("RMSNorm, but it reads more than one tensor besides x", 2)
    for index in f[0].free:
        drawn = [g.others[index].reshape(-1) for g in f]
        if any(d.numel() != s.numel() for d, s in zip(drawn, scales, strict=True)):
            continue
        factor = (scales[0] - scales[1]) / (drawn[0] - drawn[1])
        offset = scales[0] - factor * drawn[0]
        if _constant(factor) and _constant(offset):
            return _Scale(1 + index, snap(factor[0].item(), region), snap(offset[0].item(), region))
    if f[0].free or not _constant(torch.cat(scales)):
        return Reason("RMSNorm, but its weight is none of the tensors it reads", 2)
    return _Scale(None, 1.0, snap(scales[0][0].item(), region))


def _constant(values: torch.Tensor) -> bool:
    return torch.allclose(values, values[:1].expand_as(values), rtol=1e-5, atol=1e-5)


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


def _forms(region: Region, scale: _Scale, epsilon: float) -> tuple[Form, ...]:
    """In x's own dtype if it is the scale's and the result's too; else float32 inside, cast back."""
    out = fake(region.output).dtype
    kinds = {fake(n).dtype for n in region.inputs} | {out}

    def form(inside: torch.dtype) -> Form:
        def rms_norm(*inputs: torch.Tensor) -> torch.Tensor:
            x = inputs[0]
            exact = x.dtype == torch.float64
            kind = x.dtype if exact else inside
            weight = scale(inputs, kind)
            stash = {"stash_type": _DOUBLE} if exact else {}
            y: torch.Tensor = torch.ops.fxfuse.rms_norm(_cast(x, kind), weight, epsilon=epsilon, **stash)
            return y if exact else _cast(y, out)

        return rms_norm

    wide: Callable[..., torch.Tensor] = form(torch.float32)
    return (form(out), wide) if len(kinds) > 1 or out != torch.float32 else (wide,)


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _is_root_power(node: Node) -> bool:
    return op_name(node) == "pow" and argument(node, "exponent") in (0.5, -0.5)


PATTERN = RMSNorm()
