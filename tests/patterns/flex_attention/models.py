"""Small models that call flex_attention in the ways that captures have trouble with."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

HEADS, SIZE = 2, 8
WIDTH = HEADS * SIZE


def causal(b, h, q, kv):
    return q >= kv


def documents(ids):
    """Causal within a document; `ids` [B, S]."""

    def mask(b, h, q, kv):
        return (q >= kv) & (ids[b, q] == ids[b, kv])

    return mask


class Attention(nn.Module):
    """x [B, S, 16] to [B, 2, S, 8]; q, k and v come from a projection with gradients."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.projection = nn.Linear(WIDTH, 3 * WIDTH)

    def qkv(self, x):
        b, s, _ = x.shape
        return self.projection(x).view(b, s, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)


class Plain(Attention):
    def forward(self, x, ids):
        return flex_attention(*self.qkv(x))


class ScoreOfTensor(Attention):
    def forward(self, x, ids):
        def same(score, b, h, q, kv):
            return torch.where(ids[b, q] == ids[b, kv], score, score - 4)

        return flex_attention(*self.qkv(x), score_mod=same)


class MaskInside(Attention):
    def forward(self, x, ids):
        b, s, _ = x.shape
        mask = create_block_mask(documents(ids), b, None, s, s, device=x.device)
        return flex_attention(*self.qkv(x), block_mask=mask)


class MaskInsideCausal(Attention):
    def forward(self, x, ids):
        s = x.shape[1]
        return flex_attention(*self.qkv(x), block_mask=create_block_mask(causal, None, None, s, s, device=x.device))


class Compiled(MaskInside):
    """The model compiles flex_attention by itself."""

    def forward(self, x, ids):
        b, s, _ = x.shape
        mask = create_block_mask(documents(ids), b, None, s, s, device=x.device)
        return compiled(*self.qkv(x), block_mask=mask)


class TwoLayers(Attention):
    """Two calls, with captures of different kinds."""

    def forward(self, x, ids):
        b, s, _ = x.shape
        q, k, v = self.qkv(x)
        y = flex_attention(q, k, v, block_mask=create_block_mask(documents(ids), b, None, s, s, device=x.device))
        bias = self.projection.bias[:HEADS]
        return flex_attention(y, k, v, score_mod=lambda score, b, h, q, kv: score + bias[h] * (q - kv))


class MaskGiven(Attention):
    def forward(self, x, mask: BlockMask):
        return flex_attention(*self.qkv(x), block_mask=mask)


compiled = torch.compile(flex_attention, backend="eager")
INSIDE = (Plain, ScoreOfTensor, MaskInside, MaskInsideCausal, Compiled, TwoLayers)


def inputs(b: int, s: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, S, 16] and document ids [B, S] that grow along a row."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(b, s, generator=generator) < 0.3
    return torch.randn(b, s, WIDTH, generator=generator), steps.cumsum(-1)
