"""Heads in the batch, time first, windows on an axis of their own: one Attention with the model's heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.patterns.attention.attentions import (
    BATCH_AND_LENGTH,
    Columns,
    HeadsOutermost,
    TimeFirst,
    Windows,
    WindowsInTheBatch,
    fused,
)


class Torch(nn.Module):
    """`nn.MultiheadAttention`, its averaged weights returned and dropped."""

    def __init__(self, batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=batch_first, **options)
        self.named: dict[str, str] = {}

    def forward(self, x: Tensor, *masks: Tensor) -> Tensor:
        given = dict(zip(self.named, masks, strict=True))
        return self.attention(x, x, x, **given)[0]


def with_masks(*names: str) -> Torch:
    module = Torch()
    module.named = dict.fromkeys(names, "")
    return module


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(1))


def padding(batch: int, length: int) -> Tensor:
    dropped = torch.rand(batch, length, generator=torch.Generator().manual_seed(2)) < 0.4
    dropped[:, 0] = False
    return dropped


@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"add_zero_attn": True}, {"add_bias_kv": True}])
def test_weights_that_are_dropped_do_not_matter(options: dict[str, Any]) -> None:
    (_,), report = fused(Torch(**options), (tokens(2, 6),), (tokens(3, 9),))
    assert report.fused("Attention")[0].parameters["q_num_heads"] == 4


@pytest.mark.parametrize(
    ("names", "masks"),
    [
        (("key_padding_mask",), [padding(2, 6)]),
        (("attn_mask",), [torch.ones(6, 6, dtype=torch.bool).triu(1)]),
        (("attn_mask",), [torch.randn(6, 6)]),
        (("attn_mask",), [torch.randn(8, 6, 6)]),
        (
            ("attn_mask", "key_padding_mask"),
            [torch.randn(6, 6), torch.zeros(2, 6).masked_fill(padding(2, 6), -torch.inf)],
        ),
    ],
)
def test_every_kind_of_mask(names: tuple[str, ...], masks: list[Tensor]) -> None:
    (node,), report = fused(with_masks(*names), (tokens(2, 6), *masks), dims=None)
    assert report.fused("Attention")[0].parameters["q_num_heads"] == 4
    assert node.args[3] is not None


def test_padding_at_another_batch_and_length() -> None:
    module = with_masks("key_padding_mask")
    dims = BATCH_AND_LENGTH, (BATCH_AND_LENGTH,)
    nodes, _ = fused(module, (tokens(2, 6), padding(2, 6)), (tokens(3, 9), padding(3, 9)), dims=dims)
    assert len(nodes) == 1


@pytest.mark.parametrize("model", [TimeFirst, HeadsOutermost])
@pytest.mark.parametrize("masked", [False, True])
def test_heads_beside_the_batch(model: Callable[[], nn.Module], masked: bool) -> None:
    def call(batch: int, length: int) -> tuple[Tensor, ...]:
        shape = (length, batch) if model is TimeFirst else (batch, length)
        mask = padding(batch, length) if model is TimeFirst else ~padding(batch, length)
        return (tokens(*shape), mask) if masked else (tokens(*shape),)

    (_,), report = fused(model(), call(2, 6), call(3, 9))
    found = report.fused("Attention")[0].parameters
    assert found["q_num_heads"] == found["kv_num_heads"] == 4
    assert "near miss" not in str(report)


def test_matrices_that_nothing_tells_apart_are_a_batch() -> None:
    class Folded(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)

    def call(n: int, s: int, t: int) -> tuple[Tensor, ...]:
        return tokens(n, s), tokens(n, t), tokens(n, t)

    (_,), report = fused(Folded(), call(8, 5, 7), call(6, 3, 4))
    assert report.fused("Attention")[0].parameters["q_num_heads"] == 1


@pytest.mark.parametrize(
    ("model", "shape", "other", "windows"),
    [
        (Windows, (2, 5, 9), (3, 4, 9), True),
        (WindowsInTheBatch, (10, 9), (15, 9), True),
        (Columns, (2, 5, 7), (3, 4, 6), False),
    ],
)
def test_windows_and_axes_are_batches(
    model: Callable[[], nn.Module], shape: tuple[int, ...], other: tuple[int, ...], windows: bool
) -> None:
    calls = []
    for size in (shape, other):
        count = size[1] if model is Windows else 5
        calls.append((tokens(*size), torch.randn(count, 9, 9)) if windows else (tokens(*size),))
    auto = torch.export.Dim.AUTO
    axes = dict.fromkeys(range(1 if model is WindowsInTheBatch else 2), auto) | ({2: auto} if model is Columns else {})
    dims = (axes, {0: auto} if model is Windows else {}) if windows else (axes,)
    (_,), report = fused(model(), *calls, dims=dims)
    assert report.fused("Attention")[0].parameters["q_num_heads"] == 4


def test_sizes_that_have_to_be_equal_are_named() -> None:
    class Cross(Torch):
        def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
            return self.attention(x, memory, memory, need_weights=False)[0]

    _, report = fused(Cross(), (tokens(2, 6), tokens(2, 5)))
    assert report.counts == {"Attention": 1} or "with one Dim" in str(report)
