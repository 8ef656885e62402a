"""Models that spell the four meanings otherwise than the examples do."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    """One packed projection; SiLU written out, the gate first or second in the product."""

    def __init__(self, beta: float = 1.0, swapped: bool = False, axis: int = -1) -> None:
        super().__init__()
        self.projection = nn.Linear(16, 24, bias=False)
        self.beta, self.swapped, self.axis = beta, swapped, axis

    def forward(self, x: Tensor) -> Tensor:
        h = self.projection(x)
        a, b = (h[..., :12], h[..., 12:]) if self.axis == -1 else (h[..., ::2], h[..., 1::2])
        gate, up = (b, a) if self.swapped else (a, b)
        return up * (gate / (1 + torch.exp(-self.beta * gate)))


class Block(nn.Module):
    """The sum goes on; LayerNorm is written out, its variance with or without Bessel's correction."""

    def __init__(self, eps: float = 3e-4, correction: int = 0, reads_sum: bool = True, axis: int = -1) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(16) + 0.5), nn.Parameter(torch.randn(16))
        self.up = nn.Linear(16, 16)
        self.eps, self.correction, self.reads_sum, self.axis = eps, correction, reads_sum, axis

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        h = residual + x
        centred = h - h.mean(self.axis, keepdim=True)
        variance = h.var(self.axis, keepdim=True, correction=self.correction)
        y = centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias
        return self.up(y) + h if self.reads_sum else self.up(y)


class Int8(nn.Module):
    """Weights as bytes, with a scale and a zero point for each row."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-128, 127, (16, 16), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(16, 1) / 64 + 0.01)
        self.register_buffer("zero_point", torch.randint(-8, 8, (16, 1), dtype=torch.int8))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "shifted after":
            return x @ (self.weight * self.scale - self.zero_point).mT
        shifted = self.weight.float() - self.zero_point
        shifted = shifted + 1e-6 if self.how == "a little more" else shifted
        shifted = shifted.clamp(-100, 100) if self.how == "cut off" else shifted
        return torch.matmul(x, (self.scale * shifted).transpose(0, 1))


class Router(nn.Module):
    """Softmax written out; the experts are counted, or not looked at."""

    def __init__(self, k: int = 2, reads: str = "both", normalised: bool = True, tie: float = 0.0) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 8, bias=False)
        self.k, self.reads, self.normalised, self.tie = k, reads, normalised, tie

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        logits = self.gate(x)
        scores = torch.exp(logits - logits.logsumexp(-1, keepdim=True))
        if self.tie:
            scores = scores * (1 + self.tie * torch.arange(8, dtype=scores.dtype))
        if self.reads == "experts":
            return F.one_hot(scores.topk(self.k, dim=-1).indices, 8).sum(-2)
        weights, experts = scores.topk(self.k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True) if self.normalised else weights
        return weights if self.reads == "weights" else (weights, experts)
