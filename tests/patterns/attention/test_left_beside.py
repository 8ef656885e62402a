"""What stays beside an attention that was fused, and why: the report says it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import fxfuse

AXES = {0: Dim.AUTO, 2: Dim.AUTO}


class InTurn(nn.Module):
    """Query head h reads KV head h % 2."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat(1, 2, 1, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v)


class Neighbours(nn.Module):
    """Query head h reads KV head h // 2."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v)


class WeightsToo(nn.Module):
    """`[B, H, S, D]`, and the weights averaged over the heads."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return weights @ v, weights.mean(1)


def said(model: nn.Module, heads: int) -> tuple[int, str]:
    """KV heads of the fused operator, and the evidence in the report."""
    inputs = torch.randn(2, 4, 6, 8), torch.randn(2, heads, 6, 8), torch.randn(2, heads, 6, 8)
    program = torch.export.export(model.eval(), inputs, dynamic_shapes=(AXES,) * 3)
    fused = fxfuse.fuse(program)
    (entry,) = fxfuse.report(fused).fused("Attention")
    expected = model(*inputs)
    torch.testing.assert_close(fused.module()(*inputs), expected, rtol=1e-4, atol=1e-5)
    return entry.parameters["kv_num_heads"], str(entry.evidence)  # type: ignore[return-value]


def test_heads_that_stay_repeated_are_told_with_the_line() -> None:
    kv_heads, report = said(InTurn(), 2)
    assert kv_heads == 4
    assert "k stays with its heads repeated before it (repeat, test_left_beside.py:" in report
    assert "v stays with its heads repeated before it" in report


@pytest.mark.parametrize(("model", "heads"), [(Neighbours(), 2)])
def test_nothing_is_told_of_heads_that_went_in(model: nn.Module, heads: int) -> None:
    kv_heads, report = said(model, heads)
    assert kv_heads == 2
    assert "stays" not in report and "read by others" not in report


def test_weights_that_others_read_are_told() -> None:
    _, report = said(WeightsToo(), 4)
    assert "its weights are read by others (mean, test_left_beside.py:" in report
    assert "need_weights=False" in report
