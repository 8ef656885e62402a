"""Caches that grow: past keys and values [B, heads, P, head_dim] to which new ones are joined."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.golden.case import Case

HEADS, KV, SIZE = 4, 2, 8
Triple = tuple[Tensor, Tensor, Tensor]


class Joined(nn.Module):
    """New keys and values are joined to those of earlier calls, and both are given back.

    Attention takes the past as inputs and gives the present as outputs; both concatenations are gone.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, mask: Tensor) -> Triple:
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return F.scaled_dot_product_attention(q, k, v, mask), k, v


class JoinedAndRepeated(nn.Module):
    """The same with two key heads for four query heads, repeated after they are joined: the cache has two."""

    def repeat(self, x: Tensor) -> Tensor:
        batch, heads, length, size = x.shape
        return x[:, :, None].expand(batch, heads, HEADS // heads, length, size).reshape(batch, HEADS, length, size)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, mask: Tensor) -> Triple:
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return F.scaled_dot_product_attention(q, self.repeat(k), self.repeat(v), mask), k, v


class FromProjections(nn.Module):
    """q, k and v are projections [B, S, H·D] that the node takes before their heads are split and transposed."""

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, SIZE)).transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, mask: Tensor) -> Triple:
        k, v = torch.cat([past_k, self.heads(k)], 2), torch.cat([past_v, self.heads(v)], 2)
        y = F.scaled_dot_product_attention(self.heads(q), k, v, mask)
        return y.transpose(1, 2).flatten(2), k, v


class ChangedAfterwards(nn.Module):
    """Keys are cached as they are and scaled by a tensor when they are read: the attention is one node, its keys are
    not the present, and the report says what they go through."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(SIZE) + 0.5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, mask: Tensor) -> Triple:
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return F.scaled_dot_product_attention(q, k * self.scale, v, mask), k, v


def inputs(kv: int, *, flat: bool = False) -> tuple[Tensor, ...]:
    """Five new tokens after seven."""
    new = [torch.randn(2, n, 5, SIZE) for n in (HEADS, kv, kv)]
    if flat:
        new = [x.transpose(1, 2).flatten(2) for x in new]
    past = [torch.randn(2, kv, 7, SIZE) for _ in range(2)]
    return (*new, *past, torch.randn(2, 1, 5, 12))


PAST = (*({0: "B", 2: "P"},) * 2, {0: "B", 2: "S", 3: ""})
SIZES = (*({0: "B", 2: "S"},) * 3, *PAST)
FLAT = (*({0: "B", 1: "S"},) * 3, *PAST)
CASES = {
    "joined": Case(Joined(), inputs(HEADS), SIZES),
    "joined_and_repeated": Case(JoinedAndRepeated(), inputs(KV), SIZES),
    "from_projections": Case(FromProjections(), inputs(HEADS, flat=True), FLAT),
    "changed_afterwards": Case(ChangedAfterwards(), inputs(HEADS), SIZES),
}
