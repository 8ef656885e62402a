"""Weights that are cleared where their key is hidden, after the softmax: as ESPnet and many after it have it.

A row that sees no key is 0 then, which is what Attention gives. Scores that are written by a mask as an index, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxfuse
import fxfuse.onnx
from fxfuse.parity.ort import onnxruntime_outputs

LOWEST = torch.finfo(torch.float32).min
DIMS = {0: Dim.AUTO, 2: Dim.AUTO}


class Cleared(nn.Module):
    def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return self.how(q @ k.transpose(-1, -2) / 4, keep) @ v


def seen(keep: Tensor) -> Tensor:
    return keep[:, None, None, :]


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "masked_fill": lambda s, keep: s.masked_fill(~seen(keep), LOWEST).softmax(-1).masked_fill(~seen(keep), 0.0),
    "where": lambda s, keep: torch.where(seen(keep), s.masked_fill(~seen(keep), LOWEST).softmax(-1), 0.0),
    "times booleans": lambda s, keep: s.masked_fill(~seen(keep), LOWEST).softmax(-1) * seen(keep),
    "times numbers": lambda s, keep: s.masked_fill(~seen(keep), LOWEST).softmax(-1) * seen(keep).float(),
    "-inf": lambda s, keep: s.masked_fill(~seen(keep), -torch.inf).softmax(-1).masked_fill(~seen(keep), 0.0),
    "of queries": lambda s, keep: (
        s.masked_fill(~seen(keep), LOWEST).softmax(-1).masked_fill(~keep[:, None, :, None], 0.0)
    ),
}


def inputs(batch: int, length: int) -> tuple[Tensor, ...]:
    keep = torch.ones(batch, length, dtype=torch.bool)
    keep[0, :3] = False
    keep[-1] = False  # a row of which nothing is seen
    return *(torch.randn(batch, 4, length, 16) for _ in range(3)), keep


@pytest.mark.parametrize("way", WAYS)
def test_cleared_weights_are_those_of_one_attention(way: str) -> None:
    torch.manual_seed(0)
    module = Cleared(WAYS[way]).eval()
    shapes: Any = (DIMS, DIMS, DIMS, {0: Dim.AUTO, 1: Dim.AUTO})
    exported = fxfuse.onnx.export(module, inputs(3, 12), dynamic_shapes=shapes)
    assert fxfuse.report(exported).counts["Attention"] == 1
    other = inputs(2, 7)
    torch.testing.assert_close(onnxruntime_outputs(exported, other)[0], module(*other), rtol=1e-4, atol=1e-5)


HOSTILE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "only after": lambda s, keep: s.softmax(-1).masked_fill(~seen(keep), 0.0),
    "to one": lambda s, keep: s.masked_fill(~seen(keep), LOWEST).softmax(-1).masked_fill(~seen(keep), 1.0),
    "times two": lambda s, keep: s.masked_fill(~seen(keep), LOWEST).softmax(-1) * (seen(keep) * 2.0),
}


@pytest.mark.parametrize("way", HOSTILE)
def test_weights_that_are_changed_otherwise_stay_and_are_told(way: str) -> None:
    torch.manual_seed(0)
    module = Cleared(HOSTILE[way]).eval()
    shapes: Any = (DIMS, DIMS, DIMS, {0: Dim.AUTO, 1: Dim.AUTO})
    program = fxfuse.fuse(torch.export.export(module, inputs(3, 12), dynamic_shapes=shapes))
    assert fxfuse.report(program).counts.get("Attention", 0) == 0
    assert [e for e in fxfuse.report(program) if e.operator == "Attention" and e.reason]
    torch.testing.assert_close(program.module()(*inputs(2, 7)).shape, module(*inputs(2, 7)).shape)


class WrittenByAMask(nn.Module):
    def __init__(self, number: float, axes: int) -> None:
        super().__init__()
        self.number, self.axes = number, axes

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / 4
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        if self.axes == 4:
            scores[hidden.expand_as(scores)] = self.number
        else:
            scores[:, :, hidden] = self.number
        return scores.softmax(-1) @ v


@pytest.mark.parametrize("axes", [2, 4])
def test_scores_written_by_a_mask(axes: int) -> None:
    module = WrittenByAMask(float("-inf"), axes).eval()
    length = Dim("length", min=2)
    shapes = ({0: Dim.AUTO, 2: length},) * 3
    exported = fxfuse.onnx.export(module, inputs(3, 12)[:3], dynamic_shapes=shapes)
    assert fxfuse.report(exported).counts["Attention"] == 1
    other = inputs(2, 7)[:3]
    torch.testing.assert_close(onnxruntime_outputs(exported, other)[0], module(*other), rtol=1e-4, atol=1e-5)


def test_a_number_that_scores_can_reach_is_no_mask() -> None:
    module = WrittenByAMask(-1e4, 4).eval()
    program = fxfuse.fuse(torch.export.export(module, inputs(3, 12)[:3], dynamic_shapes=(DIMS,) * 3))
    (entry,) = [e for e in fxfuse.report(program) if e.reason]
    assert "a number that scores can reach" in str(entry.reason)


class WrittenByAMaskOfTheQueries(nn.Module):
    """The mask is as long as the queries on both sides, and nothing in the capture says that the keys are, too."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / 4
        scores[:, :, torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)] = float("-inf")
        return scores.softmax(-1) @ v


def test_lengths_that_have_to_be_one_are_named() -> None:
    shapes = ({0: Dim.AUTO, 2: Dim.AUTO},) * 3
    module = WrittenByAMaskOfTheQueries().eval()
    program = fxfuse.fuse(torch.export.export(module, inputs(3, 12)[:3], dynamic_shapes=shapes))
    (entry,) = [e for e in fxfuse.report(program) if e.reason]
    assert entry.status == "refused"
    assert "k.shape[2] and q.shape[2] are equal" in str(entry.reason) and "name them with one Dim" in str(entry.reason)
