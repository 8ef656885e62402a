"""Activations that are rounded to few integers, by the pairs of calls that PT2E writes."""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed  # makes the operators known
from torch import Tensor, nn

from tests.golden.case import Case

WIDTH = 8
Q = torch.ops.quantized_decomposed


class PerTensor(nn.Module):
    """One scale and one zero point for all: QuantizeLinear, and DequantizeLinear behind it."""

    def forward(self, x: Tensor) -> Tensor:
        rounded = Q.quantize_per_tensor(x, 0.05, 3, -128, 127, torch.int8)
        return Q.dequantize_per_tensor(rounded, 0.05, 3, -128, 127, torch.int8)


class NarrowRange(nn.Module):
    """Integers of -127 to 127 in a type that holds -128 too: a Clip between the two keeps the range."""

    def forward(self, x: Tensor) -> Tensor:
        rounded = Q.quantize_per_tensor(x, 0.05, 0, -127, 127, torch.int8)
        return Q.dequantize_per_tensor(rounded, 0.05, 0, -127, 127, torch.int8)


class PerChannel(nn.Module):
    """A scale and a zero point for each entry of an axis, which are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.01, 0.08, WIDTH))
        self.register_buffer("zero", torch.arange(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        rounded = Q.quantize_per_channel(x, self.scale, self.zero, 1, -128, 127, torch.int8)
        return Q.dequantize_per_channel(rounded, self.scale, self.zero, 1, -128, 127, torch.int8)


class Measured(nn.Module):
    """The scale is measured on the input, so that it is no constant: the pair stays, and the report says why."""

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = Q.choose_qparams(x, -128, 127, 1e-6, torch.int8)
        rounded = Q.quantize_per_tensor(x, scale, zero, -128, 127, torch.int8)
        return Q.dequantize_per_tensor(rounded, scale, zero, -128, 127, torch.int8)


X = torch.randn(3, WIDTH)
SIZES = ({0: "B"},)
CASES = {
    "per_tensor": Case(PerTensor(), (X,), SIZES),
    "narrow_range": Case(NarrowRange(), (X,), SIZES),
    "per_channel": Case(PerChannel(), (X,), SIZES, options={"frozen": True}),
    "measured": Case(Measured(), (X,), SIZES),
}
