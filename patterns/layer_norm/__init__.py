"""LayerNorm: y = (x - mean(x)) / sqrt(var(x) + epsilon) · scale + bias, over the last axis, written out.

Source: https://onnx.ai/onnx/operators/onnx__LayerNormalization.html; Ba et al., https://arxiv.org/abs/1607.06450.

    x ──┬─ - mean ─┬──────────────────────(·)──(·)──(+)── y        anchor: the root
        │          └─ square ─ mean ─ + eps ─ root  scale  bias
        └─ or var, std, mean(x²) - mean(x)²

Asked of a region from x to y: what is f(x) + f(-x)? That is twice the bias, for all positions alike. For large x, is
what is left, over (x - mean) / std, one vector? That is the scale. For tiny x, solve for epsilon. An RMSNorm of x less
its mean is a LayerNorm too. A call of `F.layer_norm` is one ONNX operator already, and stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.fx import Node

from fxfuse.graph.region import Region
from fxfuse.graph.view import ARITHMETIC, CAST, LAYOUT, ROOTS, GraphView, argument, fake, is_float, op_name, static
from fxfuse.ops.arguments import DOUBLE
from fxfuse.patterns.layer_norm.questions import LayerNormFunction, measure_epsilon, near_miss, of_inputs, spread
from fxfuse.proof.evaluate import draw, generator
from fxfuse.recognise.answers import Form, Found, Input, Proposal, Reason
from fxfuse.recognise.literals import snap
from fxfuse.recognise.normalisation import Scale, cast, regions_around
from fxfuse.recognise.probe import Probe
from fxfuse.recognise.walk import backward

_ANCHORS = frozenset({"rsqrt", "sqrt", "rms_norm", "linalg_vector_norm", "norm", "std", "std_mean"})
_SPREADS = frozenset({"var", "std", "var_mean", "std_mean", "getitem"})
_WHOLE, _SCALED, _PLAIN = 6, 4, 2


def _walked(name: str) -> bool:
    return name in ARITHMETIC or name in CAST or name in LAYOUT or name in ROOTS or name in _SPREADS


class LayerNorm:
    """Layer normalisation over the last axis, written out; with or without a scale and a bias."""

    name = "layer_norm"
    operator = "LayerNormalization"
    since_opset = 17
    before = ("rms_norm",)
    """What is left of a LayerNorm behind the subtraction is an RMSNorm."""

    def propose(self, view: GraphView, ask: Probe) -> Iterator[Proposal]:
        for node in view.nodes:
            if op_name(node) not in _ANCHORS and not _is_root_power(node):
                continue
            sources = [node, *backward(view, node, _walked, depth=9, limit=24)]
            if any(map(_centres, sources)):
                yield Proposal(node, regions_around(view, node, sources, _walked, 9, 5), best_rank=_WHOLE + 1)

    def recognise(self, region: Region, ask: Probe) -> Found | Reason:
        (x,) = region.sources
        if not all(is_float(n) for n in region.others):
            return Reason("it also reads tensors that are not floating point")
        size = static(fake(x).shape[-1])
        if size is None or size < 2:
            unsized = LayerNormFunction(region, ask, 1)
            return near_miss(unsized, draw(x, unsized.evaluator, generator(5)))
        functions = [LayerNormFunction(region, ask, seed) for seed in (1, 2)]
        scales, biases = [], []
        for seed, f in enumerate(functions):
            rows = draw(x, f.evaluator, generator(seed + 10))
            bias = ((f(rows) + f(-rows)) / 2).reshape(-1, size)
            if not torch.isfinite(bias).all() or not torch.allclose(bias, bias[:1].expand_as(bias), atol=1e-9):
                return Reason("not a LayerNorm")
            f.bias = bias[0]
            big = rows * 1e4
            ratio = ((f(big) - f.bias) * spread(big) / f.less_mean(big)).reshape(-1, size)
            if not torch.isfinite(ratio).all() or not torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-6):
                return near_miss(f, rows)
            huge = big * 1e5
            precise = ((f(huge) - f.bias) * spread(huge) / f.less_mean(huge)).reshape(-1, size)[0]
            scales.append(precise if torch.allclose(precise, ratio[0], rtol=1e-6) else ratio[0])
            biases.append(f.bias)
        scale, bias = of_inputs(region, functions, scales), of_inputs(region, functions, biases)
        if scale is None or bias is None or not _all_read(functions[0], scale, bias):
            return Reason("LayerNorm, but it reads a tensor that is neither its scale nor its bias")
        if _unbiased(scale, size):
            return Reason(
                "LayerNorm, but for its standard deviation, which divides by one less than there are elements: compute "
                "it with correction=0 (unbiased=False)",
                3,
            )
        measured = measure_epsilon(f, draw(x, f.evaluator, generator(7)), scales[-1])
        if isinstance(measured, Reason):
            return measured
        epsilon = snap(measured, region, tolerance=1e-6, known=f.numbers)
        parameters = {
            "epsilon": epsilon,
            "scale": scale.offset if scale.position is None else Input(scale.position),
            "bias": bias.offset if bias.position is None else Input(bias.position),
        }
        rank = (_SCALED if scale.position is not None else _PLAIN if scale.offset == 1 else 0) + (
            _WHOLE - _SCALED if bias.position is not None else 0
        )
        rank += fake(x).dtype == fake(region.output).dtype
        return Found(
            self.operator, parameters, _forms(region, scale, bias, epsilon), rank=rank, from_leaves=f.from_leaves
        )


def _forms(region: Region, scale: Scale, bias: Scale, epsilon: float) -> tuple[Form, ...]:
    """In x's own dtype if it is the weights' and the result's too; else float32 inside, cast back."""
    out = fake(region.output).dtype
    kinds = {fake(n).dtype for n in region.inputs} | {out}

    def form(inside: torch.dtype) -> Form:
        def layer_norm(*inputs: torch.Tensor) -> torch.Tensor:
            x = inputs[0]
            exact = x.dtype == torch.float64
            kind = x.dtype if exact else inside
            shift = None if bias.position is None and bias.offset == 0 else bias(inputs, kind)
            stash = {"stash_type": DOUBLE} if exact else {}
            y: torch.Tensor = torch.ops.fxfuse.layer_norm(
                cast(x, kind), scale(inputs, kind), shift, epsilon=epsilon, **stash
            )
            return y if exact else cast(y, out)

        return layer_norm

    wide: Callable[..., torch.Tensor] = form(torch.float32)
    return (form(out), wide) if len(kinds) > 1 or out != torch.float32 else (wide,)


def _all_read(f: LayerNormFunction, *found: Scale) -> bool:
    return {1 + i for i in f.free} == {s.position for s in found} - {None}


def _unbiased(scale: Scale, size: int) -> bool:
    """Is the scale what a standard deviation of one element less leaves behind?"""
    factor = scale.offset if scale.position is None else scale.factor
    return abs(factor * factor * size / (size - 1) - 1) < 1e-9


def _centres(node: Node) -> bool:
    """Is it a variance, or does it subtract what a mean is made into?"""
    if op_name(node) in ("var", "std", "var_mean", "std_mean"):
        return True
    if op_name(node) not in ("sub", "rsub", "add", "subtract"):
        return False
    return any(_is_mean(i, op_name(node) == "add") for i in node.all_input_nodes)


def _is_mean(node: Node, negated: bool) -> bool:
    """Is it a mean, perhaps squared or repeated? One that is added has to be negated before."""
    steps = CAST | LAYOUT | {"neg", "mul", "div", "pow", "square"}
    for _ in range(5):
        if op_name(node) in ("mean", "sum"):
            return not negated
        if op_name(node) not in steps or not node.all_input_nodes:
            return False
        negated = negated and op_name(node) not in ("neg", "mul")
        node = node.all_input_nodes[0]
    return False


def _is_root_power(node: Node) -> bool:
    return op_name(node) == "pow" and argument(node, "exponent") in (0.5, -0.5)


PATTERN = LayerNorm()
