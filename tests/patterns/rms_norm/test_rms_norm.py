"""RMSNorm: what looks like a constant beside it, and is one only at small sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from tests.patterns.models import export

WIDTH = 16


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def norm(self, x: Tensor, epsilon: Tensor | float = 1e-6) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


class EpsilonInATensor(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(x, torch.tensor(1e-4)) * self.weight)


class GrowsWithThePosition(Norm):
    """Llama 4's attention temperature: 1 up to a position, growing beyond it."""

    def forward(self, x: Tensor) -> Tensor:
        grown = torch.log(torch.floor(torch.arange(x.shape[1]) / 40.0) + 1.0) * 0.1 + 1.0
        return torch.tanh(self.norm(x) * grown[:, None])


@pytest.mark.parametrize("model", [EpsilonInATensor, GrowsWithThePosition])
def test_a_constant_is_one_at_every_size(model: type[Norm]) -> None:
    module = model()
    fused = fxfuse.fuse(export(module, torch.randn(2, 6, WIDTH)))
    assert fxfuse.report(fused).counts == {"RMSNormalization": 1}
    x = torch.randn(2, 100, WIDTH)
    torch.testing.assert_close(fused.module()(x), module(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-8])
def test_without_eps_it_is_that_of_the_type_it_computes_in(dtype: torch.dtype, size: float) -> None:
    """float64's own; float32's for all others. Rows of 1e-8 show both."""
    model = nn.RMSNorm(16).eval().to(dtype)
    x = (torch.randn(3, 5, 16) * size).to(dtype)
    fused = fxfuse.fuse(torch.export.export(model, (x,)))
    (entry,) = fxfuse.report(fused).fused()
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    assert entry.parameters["epsilon"] == pytest.approx(torch.finfo(computed).eps, rel=1e-6)
    torch.testing.assert_close(fused.module()(x), model(x))
