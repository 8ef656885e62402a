"""Small attentions and rotations as transformers' models write them, each for one thing that a spelling may do."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

HEADS, KV, SIZE = 4, 2, 8
WIDTH = HEADS * SIZE


def export(module: nn.Module, *inputs: Tensor) -> ExportedProgram:
    """Batch and sequence dynamic."""
    dims = tuple({0: Dim.AUTO, 1: Dim.AUTO} for _ in inputs)
    return torch.export.export(module.eval(), inputs, dynamic_shapes=dims)


class Attention(nn.Module):
    """Projections around `attend(q [B, H, S, D], k [B, KV, S, D], v, x)`, which returns ``[B, H, S, D]``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, KV * SIZE), nn.Linear(WIDTH, KV * SIZE)
        self.out = nn.Linear(WIDTH, WIDTH)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], -1, SIZE).transpose(1, 2)

    def repeat(self, x: Tensor) -> Tensor:
        batch, heads, length, size = x.shape
        x = x[:, :, None].expand(batch, heads, HEADS // heads, length, size)
        return x.reshape(batch, HEADS, length, size)

    def causal(self, length: int) -> Tensor:
        return torch.ones(length, length, dtype=torch.bool).tril()

    def forward(self, x: Tensor) -> Tensor:
        y = self.attend(self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x)), x)
        return self.out(y.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError


class ScaledWithMask(Attention):
    """CodeGen divides the scores after the mask is added: the mask is divided too."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        bias = torch.zeros(x.shape[1], x.shape[1]).masked_fill(~self.causal(x.shape[1]), torch.finfo(x.dtype).min)
        scores = (q @ self.repeat(k).transpose(-1, -2) + bias) / SIZE**0.5
        return scores.softmax(-1) @ self.repeat(v)


class BiasPerBatchAndHead(Attention):
    """Bloom: `baddbmm` adds one ALiBi row to each of B·H matrices, and the mask comes after a reshape."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        batch, _, length, _ = q.shape
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(1, HEADS, 1, 1)
        alibi = (slopes * torch.arange(length).view(1, 1, 1, -1)).expand(batch, HEADS, 1, length)
        flat_q, flat_k = q.reshape(-1, length, SIZE), self.repeat(k).reshape(-1, length, SIZE)
        scores = alibi.reshape(-1, 1, length).baddbmm(flat_q, flat_k.transpose(1, 2), beta=1.0, alpha=SIZE**-0.5)
        scores = scores.view(batch, HEADS, length, length)
        scores = scores.masked_fill(~self.causal(length), torch.finfo(x.dtype).min)
        return scores.softmax(-1) @ self.repeat(v)


class FilledByArithmetic(Attention):
    """GPT-1: `scores * b - 10000 * (1 - b)` with a triangle of floats that is a buffer; here it masks."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("triangle", torch.ones(64, 64).tril(), persistent=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        keep = self.triangle[: x.shape[1], : x.shape[1]]
        scores = q @ self.repeat(k).transpose(-1, -2) / SIZE**0.5
        return (scores * keep + -1e9 * (1 - keep)).softmax(-1) @ self.repeat(v)


class FilledByTensor(Attention):
    """GPT-Neo: `where` with a fill that is a tensor, then a second mask that is added."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        fill = torch.tensor(torch.finfo(x.dtype).min)
        padding = torch.zeros(x.shape[0], 1, 1, x.shape[1])
        scores = torch.where(self.causal(x.shape[1]), q @ self.repeat(k).transpose(-1, -2), fill)
        return (scores + padding).softmax(-1) @ self.repeat(v)


class Sinks(Attention):
    """GPT-OSS: one more score for each head, which takes its share and has no value."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        scores = q @ self.repeat(k).transpose(-1, -2) * SIZE**-0.5
        scores = scores.masked_fill(~self.causal(x.shape[1]), -torch.inf)
        sinks = self.sinks.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
        combined = torch.cat([scores, sinks], -1)
        weights = (combined - combined.max(-1, keepdim=True).values).softmax(-1)
        return weights[..., :-1] @ self.repeat(v)


class MaskMadeOfValues(Attention):
    """Doge: a bias that is computed from v, which is also what the weights multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(KV * SIZE, KV)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        gate = torch.exp(-self.gate(v.transpose(1, 2).flatten(2))).transpose(1, 2)
        bias = gate.repeat_interleave(HEADS // KV, 1)[:, :, None].expand(-1, -1, x.shape[1], -1)
        bias = bias.masked_fill(~self.causal(x.shape[1]), torch.finfo(x.dtype).min)
        return F.scaled_dot_product_attention(q, self.repeat(k), self.repeat(v), attn_mask=bias)


class ScaledValues(Attention):
    """MiMo: v is scaled before it is repeated; the scaling stays, the repeat goes."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, self.repeat(k), self.repeat(v * 0.7), is_causal=True)


class KeysAreValues(Attention):
    """DeepSeek-V4 and Inkling: one tensor is k and v."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        shared = self.repeat(k)
        return F.scaled_dot_product_attention(q, shared, shared, is_causal=True)


class OneKeyHead(Attention):
    """GPT-BigCode: q, k and v are split off one projection that has an axis of heads before the split."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, WIDTH + 2 * SIZE)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).split((WIDTH, SIZE, SIZE), dim=3)
        q = q.view(x.shape[0], x.shape[1], -1, SIZE).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, self.repeat(k), self.repeat(v), is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class HeadsInTurn(Attention):
    """JetMoE repeats its heads in turn (0 1 0 1): that is not GQA, so k and v are taken as repeated."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        k, v = k.repeat(1, HEADS // KV, 1, 1), v.repeat(1, HEADS // KV, 1, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class SharedKeys(Attention):
    """Gemma 3n: two attentions read one k and v, and both repeat them."""

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.repeat(self.heads(self.k(x))), self.repeat(self.heads(self.v(x)))
        for _ in range(2):
            y = F.scaled_dot_product_attention(self.heads(self.q(x)), k, v, is_causal=True)
            x = self.out(y.transpose(1, 2).flatten(2))
        return x


class HeadsInTurnWrittenOut(HeadsInTurn):
    """The same with the softmax written out."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        k, v = k.repeat(1, HEADS // KV, 1, 1), v.repeat(1, HEADS // KV, 1, 1)
        scores = (q @ k.transpose(-1, -2) * SIZE**-0.5).masked_fill(~self.causal(x.shape[1]), -torch.inf)
        return scores.softmax(-1) @ v


class FilledInPlace(Attention):
    """XLM: scores are scaled and masked in place."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        scores = q @ self.repeat(k).transpose(-1, -2)
        scores.div_(SIZE**0.5)
        scores.masked_fill_(~self.causal(x.shape[1]), torch.finfo(x.dtype).min)
        return scores.softmax(-1) @ self.repeat(v)
