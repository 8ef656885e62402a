"""Attention as models write it; q, k and v are [B, heads, S, head_dim] but where said otherwise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.golden.case import Case

HEADS, KV, SIZE = 4, 2, 8


class WrittenOut(nn.Module):
    """Softmax attention written out, causal by a triangle of -inf.

    That the triangle hides just what comes later, at every length, is read from the graph: it becomes `is_causal`.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        keep = torch.ones(length, length, dtype=torch.bool).tril()
        scores = (q @ k.transpose(-1, -2) * SIZE**-0.5).masked_fill(~keep, -torch.inf)
        return scores.softmax(-1) @ v


class GroupedHeads(nn.Module):
    """Two key heads for four query heads, repeated before the products: the node reads them as they were."""

    def repeat(self, x: Tensor) -> Tensor:
        batch, heads, length, size = x.shape
        return x[:, :, None].expand(batch, heads, HEADS // heads, length, size).reshape(batch, HEADS, length, size)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ self.repeat(k).transpose(-1, -2) * SIZE**-0.5
        return scores.softmax(-1) @ self.repeat(v)


class SoftCap(nn.Module):
    """Gemma 2: scores are bounded by a tanh before the mask is added; the cap is an attribute."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = torch.tanh(q @ k.transpose(-1, -2) / 16.0 / 50.0) * 50.0
        return (scores + mask).softmax(-1) @ v


class HeadsInTheBatch(nn.Module):
    """Heads folded into the batch, [B·heads, S, head_dim], for `bmm`: fairseq and BART. The node is the attention of
    [B, heads, S, head_dim]; what folds and unfolds is gone."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, size = q.shape
        q, k, v = (x.reshape(batch * heads, -1, size) for x in (q, k, v))
        weights = torch.bmm(q * SIZE**-0.5, k.transpose(1, 2)).softmax(-1)
        return torch.bmm(weights, v).view(batch, heads, length, size)


class Sink(nn.Module):
    """GPT-OSS: one more score a head takes its share of the softmax and has no value. It becomes a key of zeros whose
    mask is the sink."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.randn(HEADS))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * SIZE**-0.5
        sink = self.sink.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


class ClampedScores(nn.Module):
    """Not attention: scores are bounded where they can be reached. The graph stays as it is, and the report names the
    clamp."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) * SIZE**-0.5).clamp(-5.0, 5.0).softmax(-1) @ v


def heads(count: int) -> Tensor:
    return torch.randn(2, count, 5, SIZE)


ALL = (heads(HEADS), heads(HEADS), heads(HEADS))
SIZES = ({0: "B", 2: "S"},) * 3
MEMORY = ({0: "B", 2: "S"}, *({0: "B", 2: "T"},) * 2)
CASES = {
    "written_out": Case(WrittenOut(), ALL, SIZES),
    "grouped_heads": Case(GroupedHeads(), (heads(HEADS), heads(KV), heads(KV)), MEMORY, declared=False),
    "soft_cap": Case(SoftCap(), (*ALL, torch.randn(2, 1, 5, 5)), (*SIZES, {0: "B", 2: "S", 3: "S"})),
    "heads_in_the_batch": Case(HeadsInTheBatch(), ALL, MEMORY, declared=False),
    "sink": Case(Sink(), ALL, SIZES),
    "clamped_scores": Case(ClampedScores(), ALL, SIZES),
}
