"""Calls of `flex_attention`, whose score_mod and mask_mod are read; q, k and v are [B, heads, S, head_dim]."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.golden.case import Case

HEADS, SIZE = 2, 8


class Causal(nn.Module):
    """A mask_mod that keeps the keys up to the query: an attribute, and no mask at all."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, length, length, device="cpu")
        return flex_attention(q, k, v, block_mask=mask)


class Window(nn.Module):
    """Causal, and four keys back at most: causality is the attribute, the window a mask [1, 1, S, S]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        near = lambda b, h, q, kv: (q >= kv) & (q - kv < 4)  # noqa: E731
        mask = create_block_mask(near, None, None, length, length, device="cpu")
        return flex_attention(q, k, v, block_mask=mask)


class Capped(nn.Module):
    """A score_mod that bounds the score by a tanh: the attribute `softcap`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=lambda score, b, h, q, kv: 20.0 * torch.tanh(score / 20.0))


class Alibi(nn.Module):
    """A score_mod that adds a slope a head times the distance: a mask in float32 that is added."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=lambda score, b, h, q, kv: score + (kv - q) * torch.exp2(-1.0 - h))


class Squared(nn.Module):
    """A score_mod that no attribute or mask can say: written out in primitives, and the report says why."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=lambda score, b, h, q, kv: score * score)


ALL = tuple(torch.randn(2, HEADS, 40, SIZE) for _ in range(3))
SIZES = ({0: "B", 2: "S"},) * 3
CASES = {
    "causal": Case(Causal(), ALL, SIZES),
    "window": Case(Window(), ALL, SIZES),
    "capped": Case(Capped(), ALL, SIZES),
    "alibi": Case(Alibi(), ALL, SIZES),
    "squared": Case(Squared(), ALL, SIZES),
}
