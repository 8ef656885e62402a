"""Masks, signs and weights that are made by writing into them: what a region reads is what was written by then."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import fxfuse


def causal(length: int) -> Tensor:
    return torch.full((length, length), float("-inf")).triu(1)


def first_row_sees_all(length: int) -> Tensor:
    mask = causal(length)
    mask[0] = 0
    return mask


def prefix(length: int) -> Tensor:
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[:, :2] = True
    return mask


def made_by_writing(length: int) -> Tensor:
    mask = torch.zeros(length, length)
    return mask.masked_fill_(torch.ones(length, length).triu(1) > 0, float("-inf"))


def of_a_copy(length: int) -> Tensor:
    half = causal(length).to(torch.float16)
    half[0] = 0
    return half.float()


def without_gradients(length: int) -> Tensor:
    mask = causal(length)
    with torch.no_grad():
        mask[:, 1].fill_(0)
    return mask


def through_a_view_without_gradients(length: int) -> Tensor:
    mask = causal(length)
    with torch.no_grad():
        row = mask[0]
    row.fill_(0)
    return mask


def row_by_row(length: int) -> Tensor:
    mask = torch.zeros(length, length)
    for row in range(3):
        mask[row, row + 1 :] = float("-inf")
    return mask


class Masked(nn.Module):
    def __init__(self, mask) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = self.mask(q.shape[2])
        scores = q @ k.transpose(-1, -2) * 0.25
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1) @ v


class BeforeAndAfter(nn.Module):
    """The same mask, read twice; between the two it is written to."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = causal(q.shape[2])
        before = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mask[:, :2] = 0
        return before + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class WrittenResult(nn.Module):
    """Two equal norms, one of which is written to; squares of the same tensor before and after it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16))

    def norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight

    def forward(self, x: Tensor) -> Tensor:
        a, b, y = self.norm(x), self.norm(x), x.clone()
        a[0] = 1
        before = y.pow(2).mean(-1, keepdim=True)
        y.add_(1)
        return a + b + self.norm(y) + before


class Signs(nn.Module):
    """The rotation's sign, written into a tensor of ones."""

    def forward(self, x: Tensor) -> Tensor:
        length, dim = x.shape[-2:]
        angles = torch.outer(torch.arange(length).float(), 1e4 ** (-torch.arange(0, dim, 2) / dim))
        angles = torch.cat([angles, angles], -1)
        sign = torch.ones(dim)
        sign[: dim // 2] = -1
        return x * angles.cos() + x.roll(dim // 2, -1) * sign * angles.sin()


class Norm(nn.Module):
    """A weight and an epsilon that are written to before they are read; the weight after that, too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        weight, epsilon = self.weight.clone(), torch.full((), 1e-6)
        weight[:4] = 3.0
        epsilon.add_(0.3)
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight
        weight.zero_()
        return y


def fused_equals_eager(model: nn.Module, args: tuple[Tensor, ...], dynamic: bool) -> list[torch.fx.Node]:
    axes = {0: Dim.AUTO, args[0].ndim - 2: Dim.AUTO} if dynamic else {}
    fused = fxfuse.fuse(torch.export.export(model, args, dynamic_shapes=tuple(axes for _ in args)))
    if dynamic:
        args = tuple(torch.randn(3, *a.shape[1:-2], a.shape[-2] + 3, a.shape[-1]) for a in args)
    for _ in range(2):  # nothing of the program's own is written to
        torch.testing.assert_close(fused.module()(*args), model(*args), rtol=0, atol=1e-5)
    return [n for n in fused.graph.nodes if "fxfuse" in str(n.target)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("mask", "is_causal"),
    [
        (causal, True),
        (made_by_writing, True),
        (first_row_sees_all, False),
        (prefix, False),
        (of_a_copy, False),
        (row_by_row, False),
        (without_gradients, False),
        (through_a_view_without_gradients, False),
    ],
)
def test_a_mask_is_what_was_written_into_it(mask, is_causal: bool, dynamic: bool) -> None:
    qkv = tuple(torch.randn(2, 3, 9, 16) for _ in range(3))
    (attention,) = fused_equals_eager(Masked(mask), qkv, dynamic)
    assert bool(attention.kwargs.get("is_causal", 0)) == is_causal


@pytest.mark.parametrize("dynamic", [False, True])
def test_two_that_look_equal_are_not_with_a_write_between(dynamic: bool) -> None:
    qkv = tuple(torch.randn(2, 3, 9, 16) for _ in range(3))
    assert len(fused_equals_eager(BeforeAndAfter(), qkv, dynamic)) == 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_two_that_are_equal_stay_apart_from_what_is_written_to_one(dynamic: bool) -> None:
    """The write is read as what it computes, and stays so: one norm is enough for both."""
    assert len(fused_equals_eager(WrittenResult(), (torch.randn(4, 5, 16),), dynamic)) == 2


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("model", "args"), [(Signs(), (2, 3, 9, 16)), (Norm(), (4, 5, 16))])
def test_signs_and_weights(model: nn.Module, args: tuple[int, ...], dynamic: bool) -> None:
    assert len(fused_equals_eager(model, (torch.randn(*args),), dynamic)) == 1
