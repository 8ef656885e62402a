"""Norms as models write them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.golden.case import Case

WIDTH = 8


class FloatInside(nn.Module):
    """RMSNorm of a half-precision model, computed in float32 and cast back before the weight: Llama of transformers.

    Becomes one node in the model's type: RMSNormalization computes in float32 inside (`stash_type`), and rounds before
    it multiplies by the weight, as the model does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class CastLast(nn.Module):
    """The same, but the weight is multiplied before the cast back: TorchTune's RMSNorm.

    The product with the weight is rounded once, so the node runs in float32, with the model's casts around it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale).type_as(x)


class OnePlusWeight(nn.Module):
    """Gemma keeps w and multiplies by 1 + w: the sum is computed beside the node and given to it as the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return normed * (1.0 + self.weight)


class ByVectorNorm(nn.Module):
    """Written as x divided by its length over √D, with nothing that is called a mean or a root."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * WIDTH**-0.5
        return x / (length**2 + 1e-5).sqrt() * self.g


class Gated(nn.Module):
    """A gate that is another tensor of x's shape: the norm alone is the node, the product with the gate stays."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        return normed * torch.nn.functional.silu(gate)


class Clamped(nn.Module):
    """Not RMSNorm: the mean of squares is bounded from above. The graph stays as it is, and the report says so."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp(max=100.0) + 1e-6)


X = torch.randn(2, 5, WIDTH)
SIZES = ({0: "B", 1: "S"},)
CASES = {
    "float_inside": Case(FloatInside(), (X.half(),), SIZES),
    "cast_last": Case(CastLast(), (X.half(),), SIZES),
    "one_plus_weight": Case(OnePlusWeight(), (X,), SIZES),
    "by_vector_norm": Case(ByVectorNorm(), (X,), SIZES),
    "gated": Case(Gated(), (X, X.clone()), SIZES * 2),
    "clamped": Case(Clamped(), (X,), SIZES),
}
