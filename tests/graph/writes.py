"""Writes in place as models write them: what is made, views of it, and what is written through them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Write = Callable[[Tensor], Tensor]


def strided(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[..., 0::2] = x[..., 1::2] * 2
    y[..., 1::2] = x[..., 0::2]
    return y


def halves(x: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    half = x.shape[-1] // 2
    y[..., :half] = -x[..., half:]
    y[..., half:] = x[..., :half]
    return y + 1


def pieces(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    first, second = y.chunk(2, -1)
    first.copy_(x[..., 8:])
    second += x[..., :8]
    return y


def split_and_unbound(x: Tensor) -> Tensor:
    y = x * 1
    a, b, _ = y.split([4, 4, 8], -1)
    a.mul_(b)
    even, odd = y.view(*y.shape[:-1], 8, 2).unbind(-1)
    even.add_(odd)
    return y


def through_views(x: Tensor) -> Tensor:
    y = x + 0
    pairs = y.view(*y.shape[:-1], 8, 2)
    pairs[..., 0].mul_(2)
    y.transpose(0, 1)[1].fill_(3)
    y.permute(2, 0, 1)[0].zero_()
    y.unsqueeze(0)[0, :, 2:4] = 1
    return pairs + 1


def negative(x: Tensor) -> Tensor:
    y = x * 2
    y[:, -2:] += x[:, :2]
    y[-1] = 0
    y[..., -1] -= 1
    return y


def read_between(x: Tensor) -> Tensor:
    y = x * 2
    first = y[:, 0]
    before = y.sum()
    y[:, 0] = 1
    after = y.sum()
    y.mul_(2)
    return first + before - after + y[:, 1]


def result_used(x: Tensor) -> Tensor:
    y = x * 2
    z = y[..., :4].add_(1)
    y.add_(1)
    return z + y[..., :4]


def masked(x: Tensor) -> Tensor:
    y = x @ x.transpose(-1, -2)
    y[..., :2].masked_fill_(y[..., :2] > 0, 0.5)
    y.tril_()
    y[y < 0] = 2.0
    return y


def diagonal(x: Tensor) -> Tensor:
    y = x @ x.transpose(-1, -2)
    y.diagonal(dim1=-2, dim2=-1).fill_(7)
    return y


def broadcast(x: Tensor) -> Tensor:
    y = torch.ones(x.shape[0], x.shape[1], 16)
    y[:] = x[0, 0]
    y[:, 1:] *= x[:, :1]
    return y


def narrowed(x: Tensor) -> Tensor:
    y = x.clone()
    y.narrow(-1, 2, 3).copy_(x[..., :3])
    return y.half().float()


def stacked(x: Tensor) -> Tensor:
    y = torch.empty(x.shape[0], x.shape[1], 8, 2)
    torch.stack((x[..., 8:], x[..., :8]), -1, out=y)
    torch.mul(x[..., :8], 2, out=y[..., 1])
    return y.flatten(-2)


def activations(x: Tensor) -> Tensor:
    y = F.relu(x + 1, inplace=True)
    y[..., :4].exp_().clamp_(max=2)
    return y


def an_input(x: Tensor) -> Tensor:
    y = x.view(-1, 16)
    y[0].mul_(1)
    return x + 0


def a_copy_of_before(x: Tensor) -> Tensor:
    y = x * 2
    flat = y.transpose(0, 1).reshape(-1, 16)
    y[:, 0] = 1
    return flat.sum() + y


WRITES: list[Write] = [
    strided,
    halves,
    pieces,
    split_and_unbound,
    through_views,
    negative,
    read_between,
    result_used,
    masked,
    diagonal,
    broadcast,
    narrowed,
    stacked,
    activations,
    an_input,
    a_copy_of_before,
]
KEPT = {an_input, a_copy_of_before}
"""Written to what is seen outside, or read in a way that cannot be told."""
