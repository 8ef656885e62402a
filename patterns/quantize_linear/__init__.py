"""Activations rounded to what few integers stand for: QuantizeLinear, and DequantizeLinear behind it.

Source: https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html

    x ── quantize ── integers ── dequantize ── y        anchor: y, of an input's x, with scales that are kept

    y = (saturate(round(x / scale) + zero point) - zero point) · scale

Scales, zero points, axis and range are read off PyTorch's operators for it (`quantized_decomposed`, which PT2E writes),
and the pair of ONNX's operators is then run beside them like any replacement. Where the range is narrower than the
type, a Clip between the two keeps it. PyTorch multiplies by 1 / scale where ONNX divides by the scale: of a number that
lies halfway between two steps, to within float32's rounding, either may be the nearer one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfuse.graph.region import Region, between
from fxfuse.graph.view import GraphView, argument, fake, op_name
from fxfuse.ops.quantize_linear import MADE
from fxfuse.recognise.answers import NEAR, Form, Found, Input, Proposal, Reason
from fxfuse.recognise.probe import Probe

QUANTIZES = frozenset(["quantize_per_tensor", "quantize_per_channel"])
_DEQUANTIZES = frozenset(["dequantize_per_tensor", "dequantize_per_channel"])


class QuantizeLinear:
    """Numbers rounded to those that integers stand for."""

    name = "quantize_linear"
    operator = "QuantizeLinear"
    after = ("dequantize_linear",)
    since_opset = 23

    def propose(self, view: GraphView, ask: Probe) -> Iterator[Proposal]:
        for node in view.nodes:
            source = node.args[0] if op_name(node) in _DEQUANTIZES else None
            if not isinstance(source, Node) or op_name(source) not in QUANTIZES or node in ask.kept:
                continue
            x = source.args[0]
            assert isinstance(x, Node), "it quantises a tensor"
            region = between(view, node, [x], (QUANTIZES | _DEQUANTIZES).__contains__)
            measured = Reason("its scale is measured as the input comes: it is no constant", NEAR)
            yield Proposal(node, () if region is None else (region,), missed=None if region else measured, best_rank=0)

    def recognise(self, region: Region, ask: Probe) -> Found | Reason:
        first, last = region.nodes[0], region.nodes[-1]
        if len(region.nodes) != 2 or op_name(first) not in QUANTIZES:
            return Reason("it is more than a pair")
        x = fake(region.sources[0])
        if x.dtype != torch.float32 or fake(region.output).dtype != torch.float32:
            return Reason(f"it is computed in float32, and x is {x.dtype}", NEAR)
        read = [_read(node, region, x.dim()) for node in (first, last)]
        if not read[0].same(read[1]):
            return Reason("it is quantised with other scales than it is dequantised with", NEAR)
        how = read[0]
        if how.kind not in MADE.values():
            return Reason(f"QuantizeLinear makes no {how.kind}", NEAR)
        why = how.why_not(region, ask)
        if why is not None:
            return why
        parameters: dict[str, Any] = {
            "axis": how.axis,
            "scale": Input(1 + how.scale) if isinstance(how.scale, Place) else how.scale,
            "zero_point": Input(1 + how.zero) if isinstance(how.zero, Place) else how.zero,
            "range": [how.low, how.high],
            "type": str(how.kind).removeprefix("torch."),
        }
        return Found(self.operator, parameters, (_form(how),))


class Place(int):
    """Which of `Region.others`."""


@dataclass(frozen=True)
class _How:
    """What one of the two operators is given."""

    scale: Place | float
    zero: Place | int
    axis: int | None
    low: int
    high: int
    kind: torch.dtype

    def same(self, other: _How) -> bool:
        """The range of the dequantising one is for the reader alone."""
        return self._read() == other._read()

    def _read(self) -> tuple[Any, ...]:
        return self.scale, type(self.scale), self.zero, type(self.zero), self.axis, self.kind

    def why_not(self, region: Region, ask: Probe) -> Reason | None:
        """Zero points of a wider type have to be known to fit."""
        if not isinstance(self.zero, Place):
            held = (self.zero, self.zero)
        else:
            ask.read_leaves = True
            value = ask.kept.value(region.others[self.zero])
            if value is None:
                return Reason("its zero points are not known to fit into the type of the integers", NEAR)
            held = int(value.min()), int(value.max())
        info = torch.iinfo(self.kind)
        fits = info.min <= held[0] and held[1] <= info.max and info.min <= self.low and self.high <= info.max
        return None if fits else Reason(f"its zero points or its range lie beyond {self.kind}", NEAR)


def _read(node: Node, region: Region, rank: int) -> _How:
    several = "per_channel" in op_name(node)

    def given(name: str) -> Any:
        value = argument(node, name + "s" * several)
        if not isinstance(value, Node):
            return value
        canonical = region.view.canonical(value)
        return Place(next(i for i, n in enumerate(region.others) if n in (value, canonical)))

    axis = argument(node, "axis") % rank if several else None
    ends = argument(node, "quant_min"), argument(node, "quant_max")
    return _How(given("scale"), given("zero_point"), axis, *ends, argument(node, "dtype"))


def _form(how: _How) -> Form:
    def pair(x: Tensor, *others: Tensor) -> Tensor:
        scale = others[how.scale] if isinstance(how.scale, Place) else torch.full([], how.scale, dtype=x.dtype)
        scale = scale if scale.dtype == x.dtype else scale.to(x.dtype)
        zero = others[how.zero] if isinstance(how.zero, Place) else torch.full([], how.zero, dtype=how.kind)
        zero = zero if zero.dtype == how.kind else zero.to(how.kind)
        if how.axis is None:
            scale, zero = scale.reshape([]), zero.reshape([])
        axis = 1 if how.axis is None else how.axis
        integers = torch.ops.fxfuse.quantize_linear(x, scale, zero, axis=axis)
        info = torch.iinfo(how.kind)
        if (how.low, how.high) != (info.min, info.max):
            integers = integers.clamp(how.low, how.high)
        y: Tensor = torch.ops.fxfuse.dequantize_linear(integers, scale, zero, axis=axis)
        return y

    return pair


PATTERN = QuantizeLinear()
