"""Rows so small that a model's bound and the operator's epsilon, which stands for it, tell them apart.

    x / max(|x|, 1e-12) · √D · g          F.normalize
    x / √(mean(x²) + 1e-24 / D) · g       RMSNormalization

Both are linear in rows far below the bound, with one factor, and the same far above it. In between they differ: in
float32 that begins where the square of bound over norm rounds away, some 4000 times above the bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Floor:
    """Where the two differ, by the root mean square of a row."""

    bound: float
    """What the model divides by at least, as a root mean square."""
    below: float
    """Rows larger than this differ by less than rounding; rows of 0 give 0 in both."""
    exact: float
    """Rows larger than this do not differ in float64 either."""
    hidden: float
    """The relative difference that is allowed between `below` and `exact`: a part of a unit of the model's type."""
    most: float
    """The largest relative difference in rows smaller than that."""
    zeros: str = ""
    """What rows of 0 give in the model's own type, if that is something else."""
    met: bool = True
    """Can rows be so small in the model's own type at all? If not, the report does not mention them."""

    @property
    def said(self) -> tuple[str, ...]:
        """What differs, for the report."""
        return tuple(filter(None, (self.small if self.met else "", self.zeros)))

    @property
    def small(self) -> str:
        return (
            f"rows that are not 0 but smaller than {self.below:.1e} (root mean square) differ by up to "
            f"{self.most:.0%}: the model bounds what it divides by at {self.bound:.1e}, the operator adds an epsilon"
        )

    def free(self, x: Tensor) -> Tensor:
        """Which elements need not be compared."""
        rows = _rows(x)
        return ((rows > 0) & (rows < self.below)).expand(x.shape)

    def hides(self, x: Tensor, result: Tensor) -> Tensor:
        """How far each element may be off."""
        near = (_rows(x) < self.exact).expand(x.shape)
        return torch.where(near, self.hidden * result.abs().nan_to_num(), 0.0)


def _rows(x: Tensor) -> Tensor:
    size = x.abs().amax(-1, keepdim=True)
    scaled = x / torch.where(size > 0, size, 1.0)  # squares of 1e-200 are 0
    return scaled.square().mean(-1, keepdim=True).sqrt() * size
