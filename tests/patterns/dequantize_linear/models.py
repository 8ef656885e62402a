"""Small models with weights kept as integers: torchao's, and written out in every way that people write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

N, K, G = 48, 64, 16
"""Rows, columns, and how many of a row share a scale."""


def mlp(dtype: torch.dtype = torch.float32, *, bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128, bias=bias), nn.SiLU(), nn.Linear(128, 64, bias=bias)).eval().to(dtype)


class Written(nn.Module):
    """x @ weight.T, where `how` makes the weight of integers, scales and zero points.

    Args:
        low: the least integer; 16 values are drawn from there on.
        kind: their type.
        zeros: the type in which zero points are kept.
    """

    def __init__(
        self,
        how: Callable[[Written], Tensor],
        *,
        low: int = -8,
        kind: torch.dtype = torch.int8,
        zeros: torch.dtype = torch.int64,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.how = how
        self.register_buffer("w", torch.randint(low, low + 16, (N, K), generator=generator).to(kind))
        self.register_buffer("z", torch.randint(low, low + 16, (N, K // G), generator=generator).to(zeros))
        self.register_buffer("s", (torch.rand(N, K // G, generator=generator) * 0.1 + 0.01).to(dtype))
        self.register_buffer("rows", (torch.rand(N, generator=generator) * 0.1 + 0.01).to(dtype))
        self.register_buffer("columns", (torch.rand(K, generator=generator) * 0.1 + 0.01).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.how(self).t()

    @property
    def apart(self) -> Tensor:
        """The integers in the model's type, [N, K / G, G]."""
        return self.w.to(self.s.dtype).view(N, K // G, G)


WAYS: dict[str, tuple[Callable[[Written], Tensor], int, int | None, bool]] = {
    "groups": (lambda m: ((m.apart - m.z[..., None].to(m.s.dtype)) * m.s[..., None]).view(N, K), 1, G, True),
    "groups, symmetric": (lambda m: (m.apart * m.s[..., None]).reshape(N, K), 1, G, False),
    "less in integers": (
        lambda m: ((m.w.to(torch.int32).view(N, K // G, G) - m.z[..., None]) * m.s[..., None]).flatten(1),
        1,
        G,
        True,
    ),
    "repeated": (
        lambda m: (m.w.to(m.s.dtype) - m.z.to(m.s.dtype).repeat_interleave(G, 1)) * m.s.repeat_interleave(G, 1),
        1,
        G,
        True,
    ),
    "expanded": (lambda m: m.w * m.s[:, :, None].expand(N, K // G, G).reshape(N, K), 1, G, False),
    "rows": (lambda m: m.w.to(m.s.dtype) * m.rows[:, None], 1, K, False),
    "rows, divided": (lambda m: m.w.to(m.s.dtype) / m.rows[:, None], 1, None, False),
    "columns": (lambda m: m.w * m.columns, 0, N, False),
    "one for all": (lambda m: m.w.to(m.s.dtype) * 0.05, 1, None, False),
    "an offset that is written": (lambda m: ((m.apart - 3) * m.s[..., None]).view(N, K), 1, G, True),
    "two scales": (lambda m: (m.apart * m.s[..., None]).view(N, K) * m.rows[:, None], 1, G, False),
}
"""By name: the weight, and what DequantizeLinear has to have: axis, block size, and whether a zero point.

Where one scale in the place of the model's arithmetic would round otherwise (a quotient, two products), it is only a
part of it, and the rest stays as it is.
"""
