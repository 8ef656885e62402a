"""Attentions as public code writes them, each for one layout, and how they are held to their own numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Node

import fxfuse
from fxfuse.report.model import Report

BATCH_AND_LENGTH = {0: Dim.AUTO, 1: Dim.AUTO}


def fused(module: nn.Module, *calls: Sequence[Tensor], dims: Any = BATCH_AND_LENGTH) -> tuple[list[Node], Report]:
    """The Attention nodes and the report; the fused program gives what the module gives at every one of the calls.

    Args:
        dims: the dynamic axes of each input, or of all of them.
    """
    module = module.eval()
    shapes = dims if isinstance(dims, tuple) or dims is None else (dims,) * len(calls[0])
    program = fxfuse.fuse(torch.export.export(module, tuple(calls[0]), dynamic_shapes=shapes))
    for inputs in calls:
        torch.testing.assert_close(program.module()(*inputs), module(*inputs), rtol=1e-4, atol=1e-4)
    nodes = [n for n in program.graph.nodes if n.target is torch.ops.fxfuse.attention.default]
    return nodes, fxfuse.report(program)


class TimeFirst(nn.Module):
    """fairseq's MultiheadAttention: ``[T, B, E]``, heads folded into the batch as ``[B·H, T, D]``, masks unfolded.

    https://github.com/facebookresearch/fairseq/blob/main/fairseq/modules/multihead_attention.py
    """

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.size = heads, width // heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def folded(self, x: Tensor) -> Tensor:
        return x.contiguous().view(-1, x.shape[1] * self.heads, self.size).transpose(0, 1)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        length, batch, width = x.shape
        q, k, v = self.folded(self.q(x) * self.size**-0.5), self.folded(self.k(x)), self.folded(self.v(x))
        scores = torch.bmm(q, k.transpose(1, 2))
        if padding is not None:
            scores = scores.view(batch, self.heads, length, length)
            scores = scores.masked_fill(padding[:, None, None, :], -torch.inf).view(-1, length, length)
        weights = scores.float().softmax(-1).type_as(scores)
        y = torch.bmm(weights, v).transpose(0, 1).contiguous().view(length, batch, width)
        return self.out(y)


class HeadsOutermost(TimeFirst):
    """``[H·B, T, D]``, as in https://github.com/jadore801120/attention-is-all-you-need-pytorch of 2018."""

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        batch, length, _ = x.shape
        shape = batch, length, self.heads, self.size
        q, k, v = (f(x).view(shape).permute(2, 0, 1, 3).reshape(-1, *shape[1::2]) for f in (self.q, self.k, self.v))
        scores = torch.bmm(q, k.transpose(1, 2)) / self.size**0.5
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None].repeat(self.heads, length, 1), -torch.inf)
        y = torch.bmm(scores.softmax(2), v).view(self.heads, batch, length, self.size)
        return self.out(y.permute(1, 2, 0, 3).reshape(batch, length, -1))


class Windows(nn.Module):
    """Swin with the windows on an axis of their own, ``[B, W, H, N, D]``: biases of heads, masks of windows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(32, 96)
        self.bias = nn.Parameter(torch.randn(4, 9, 9))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, windows, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, windows, length, 3, 4, 8).permute(3, 0, 1, 4, 2, 5)
        scores = (q * 0.35) @ k.transpose(-2, -1) + self.bias + mask[:, None]
        return (scores.softmax(-1) @ v).transpose(2, 3).reshape(batch, windows, length, width)


class WindowsInTheBatch(Windows):
    """Swin as it is: windows folded into the batch, unfolded to add the mask of each window."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows, length, width = x.shape
        windows = mask.shape[0]
        q, k, v = self.qkv(x).reshape(rows, length, 3, 4, 8).permute(2, 0, 3, 1, 4)
        scores = (q * 0.35) @ k.transpose(-2, -1) + self.bias
        scores = scores.view(rows // windows, windows, 4, length, length) + mask.unsqueeze(1).unsqueeze(0)
        y = scores.view(-1, 4, length, length).softmax(-1) @ v
        return y.transpose(1, 2).reshape(rows, length, width)


class Columns(nn.Module):
    """Axial attention over the columns of ``[B, Y, X, C]``: X is one more batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(3, 0, 2, 4, 1, 5)
        y = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1) @ v
        return y.permute(0, 3, 1, 2, 4).flatten(3)
