"""LayerNorms as models write them out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.golden.case import Case

WIDTH = 8


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))


class ByVariance(Norm):
    """x less its mean, over the root of its variance: BERT's own code of old."""

    def forward(self, x: Tensor) -> Tensor:
        apart = x - x.mean(-1, keepdim=True)
        return self.weight * apart / torch.sqrt(apart.pow(2).mean(-1, keepdim=True) + 1e-5) + self.bias


class WithoutBias(Norm):
    """Cohere's: a weight and no bias."""

    def forward(self, x: Tensor) -> Tensor:
        apart = x - x.mean(-1, keepdim=True)
        return self.weight * (apart * torch.rsqrt(apart.pow(2).mean(-1, keepdim=True) + 1e-5))


class OfAResidual(Norm):
    """A sum is normalised and read by others too: the sum stays in front of the node, once for both."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        added = x + residual
        apart = added - added.mean(-1, keepdim=True)
        normed = apart / torch.sqrt(apart.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight + self.bias
        return normed, added


class Called(Norm):
    """A call of `F.layer_norm`, which is one operator already."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), self.weight, self.bias)


class UnbiasedVariance(Norm):
    """Not LayerNorm: `std` divides by one less than the number of features, and epsilon is added to the root."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5) + self.bias


X = torch.randn(2, 5, WIDTH)
SIZES = ({0: "B", 1: "S"},)
CASES = {
    "by_variance": Case(ByVariance(), (X,), SIZES),
    "without_bias": Case(WithoutBias(), (X,), SIZES),
    "of_a_residual": Case(OfAResidual(), (X, X.clone()), SIZES * 2),
    "called": Case(Called(), (X,), SIZES),
    "unbiased_variance": Case(UnbiasedVariance(), (X,), SIZES),
}
