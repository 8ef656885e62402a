"""Weights kept as integers: a linear layer [N, K] whose scales are shared by groups of G along K."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.golden.case import Case

N, K, G = 4, 16, 8


class Integers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("w", torch.randint(-8, 8, (N, K), generator=generator, dtype=torch.int8))
        self.register_buffer("zero", torch.randint(-8, 8, (N, K // G), generator=generator, dtype=torch.int8))
        self.register_buffer("scale", torch.rand(N, K // G, generator=generator) + 0.5)
        self.register_buffer("rows", torch.rand(N, generator=generator) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight().t()

    def weight(self) -> Tensor:
        raise NotImplementedError


class ARow(Integers):
    """One scale a row of the weight, no zero point: DequantizeLinear with a block for every row."""

    def weight(self) -> Tensor:
        return self.w.to(torch.float32) * self.rows[:, None]


class InGroups(Integers):
    """A scale and a zero point for every eight of a row: blocks of DequantizeLinear."""

    def weight(self) -> Tensor:
        apart = self.w.view(N, K // G, G) - self.zero[..., None].to(torch.float32)
        return (apart * self.scale[..., None]).view(N, K)


class ScalesRepeated(Integers):
    """The same blocks, written with scales and zero points repeated to the weight's shape."""

    def weight(self) -> Tensor:
        zero = self.zero.to(torch.float32).repeat_interleave(G, 1)
        return (self.w.to(torch.float32) - zero) * self.scale.repeat_interleave(G, 1)


class TwoInAByte(Integers):
    """Two integers of four bits in every byte, the low one first: unpacked once, and kept as such in the file."""

    def __init__(self) -> None:
        super().__init__()
        words = torch.randint(0, 256, (N, K // 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        self.register_buffer("words", words)

    def weight(self) -> Tensor:
        pairs = torch.stack([self.words & 15, self.words >> 4], -1).view(N, K // G, G)
        return ((pairs.to(torch.float32) - 8.0) * self.scale[..., None]).view(N, K)


class Squared(Integers):
    """The integers are squared before they are scaled, which DequantizeLinear does not do.

    The integers alone are one, with a scale of 1, so that the file keeps them small; square and scales stay.
    """

    def weight(self) -> Tensor:
        return self.w.to(torch.float32).square() * self.rows[:, None]


X = torch.randn(3, K)
FROZEN = {"frozen": True}
CASES = {
    "a_row": Case(ARow(), (X,), ({0: "B"},), options=FROZEN),
    "in_groups": Case(InGroups(), (X,), ({0: "B"},), options=FROZEN),
    "scales_repeated": Case(ScalesRepeated(), (X,), ({0: "B"},), options=FROZEN),
    "two_in_a_byte": Case(TwoInAByte(), (X,), ({0: "B"},), options=FROZEN),
    "squared": Case(Squared(), (X,), ({0: "B"},), options=FROZEN),
}
