"""Sizes that capture keeps apart and the program needs equal: tried as in the sample, and met where they are not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import fxfuse
from fxfuse.recognise.catalogue import unregister

FREE = {0: Dim.AUTO, 1: Dim.AUTO}


class Cross(nn.Module):
    """Queries of x, keys and values of a memory, whose batch is that of x by a view alone."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor, keep: Tensor) -> Tensor:
        batch = x.shape[0]
        q, k, v = (
            f(t).view(batch, -1, 2, 8).transpose(1, 2) for f, t in zip(self.project, (x, memory, memory), strict=True)
        )
        mask = keep.view(batch, 1, 1, -1)
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class WrittenOut(Cross):
    def forward(self, x: Tensor, memory: Tensor, keep: Tensor) -> Tensor:
        batch = x.shape[0]
        q, k, v = (
            f(t).view(batch, -1, 2, 8).transpose(1, 2) for f, t in zip(self.project, (x, memory, memory), strict=True)
        )
        scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~keep.view(batch, 1, 1, -1), float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Torch(nn.Module):
    """PyTorch's own, which views keys and values by the batch of the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor, keep: Tensor) -> Tensor:
        found: Tensor = self.attention(x, memory, memory, key_padding_mask=~keep, need_weights=False)[0]
        return found


def sample(batch: tuple[int, int, int], length: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    keep = torch.rand(batch[2], length[2]) < 0.7
    keep[:, 0] = True
    return torch.randn(batch[0], length[0], 16), torch.randn(batch[1], length[1], 16), keep


def captured(model: nn.Module, oblivious: bool) -> torch.export.ExportedProgram:
    with torch.fx.experimental._config.patch(backed_size_oblivious=oblivious):  # type: ignore[attr-defined]
        return torch.export.export(model, sample((3, 3, 3), (6, 8, 8)), dynamic_shapes=(FREE, FREE, FREE))


@pytest.mark.parametrize("oblivious", [False, True], ids=["as torch.export", "as torch.onnx"])
@pytest.mark.parametrize("model", [Cross, WrittenOut, Torch])
def test_is_the_model_wherever_that_runs(model: Any, oblivious: bool) -> None:
    eager = model().eval()
    program = captured(eager, oblivious)
    fused = fxfuse.fuse(program)
    assert fxfuse.report(fused).counts["Attention"] == 1, fxfuse.report(fused)
    same, apart = 0, 0
    for batch, length in itertools.product(itertools.product((2, 4), repeat=3), itertools.product((1, 4, 8), repeat=2)):
        args = sample(batch, (3, *length))
        expected, actual = (run(m, args) for m in (eager, fused.module(check_guards=False)))
        if expected is not None and actual is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
            same, apart = same + 1, apart + (len(set(batch)) > 1 or length[0] != length[1])
    assert same >= 6 + apart


def run(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor | None:
    """None where it fails."""
    try:
        with torch.no_grad():
            found: Tensor = module(*args)
            return found
    except Exception:  # of unequal sizes, by whichever operator meets them first
        return None


def test_what_is_equal_is_in_the_report() -> None:
    report = fxfuse.report(fxfuse.fuse(captured(Cross().eval(), oblivious=True)))
    (entry,) = [e for e in report if e.status == "fused"]
    assert entry.evidence is not None
    claims = "; ".join(entry.evidence.claims)
    assert "keep.shape[0] and memory.shape[0] and x.shape[0] are equal, or the model fails" in claims
    assert any(len({v for k, v in s.items()}) > 1 for s in entry.evidence.sizes)


@torch.library.custom_op("fxfuse_tests::scaled_rows", mutates_args=())
def scaled_rows(x: Tensor, w: Tensor) -> Tensor:
    """Rows times weights of the same length: a single one is padded with ones, as no multiplication does."""
    return torch.tanh(x) * (F.pad(w, (0, x.shape[1] - w.shape[0]), value=1.0) if w.shape[0] == 1 else w)[:, None]


@scaled_rows.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return torch.empty_like(x)


class Rows(nn.Module):
    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(x) * w.view(x.shape[0], -1)[0][:, None]


def test_unequal_sizes_that_run_and_differ_are_refused_with_what_to_do() -> None:
    pattern = fxfuse.pattern(replacement=scaled_rows)(lambda x, w: torch.tanh(x) * w[:, None])
    unregister(pattern.name)  # from the catalogue, which other tests use
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        program = torch.export.export(Rows(), (torch.randn(3, 8, 16), torch.randn(3, 8)), dynamic_shapes=(FREE, FREE))
    report = fxfuse.report(fxfuse.fuse(program, patterns=[pattern]))
    assert not [e for e in report if e.status == "fused"]
    (reason,) = [str(e.reason) for e in report]
    assert "name them with one Dim" in reason and "w.shape[0] and x.shape[0]" in reason
