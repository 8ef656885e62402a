"""Sizes that are computed of others are met long enough: frames of a waveform, patches of an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import fxfuse
from fxfuse.recognise.probe import Probe

LENGTHS: dict[str, Callable[[Any], Any]] = {
    "frames": lambda t: t // 10,
    "frames of a window": lambda t: (t - 1) // 2,
    "frames of frames": lambda t: (t // 10 - 1) // 2,
    "pooled": lambda t: (t // 10 - 3) // 2 + 1,
    "the shorter of two": lambda t: torch.sym_min((t // 10 - 3) // 2 + 1, (t // 10 - 1) // 2),
}


class Frames(nn.Module):
    """SEW: the lengths of a pooled and of a convolved waveform differ, and the shorter one is attended to.

    Its mask shows every key. At the fewest samples that can be captured there is one frame, where every mask is causal.
    """

    def __init__(self, length: Callable[[Any], Any]) -> None:
        super().__init__()
        self.length = length

    def forward(self, x: Tensor) -> Tensor:
        n = self.length(x.shape[1])
        q = x[:, :n].unflatten(-1, (4, 16)).transpose(1, 2)
        seen = (torch.arange(n)[:, None] >= 0)[None, None].expand(x.shape[0], 1, n, n)
        return F.scaled_dot_product_attention(q, q, q, seen)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_mask_that_shows_all_is_not_causal(length: str) -> None:
    module = Frames(LENGTHS[length])
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    program = torch.export.export(module, (torch.randn(2, 640, 64),), dynamic_shapes=shapes)
    fused = fxfuse.fuse(program)
    (entry,) = fxfuse.report(fused)
    assert entry.status == "fused" and not entry.parameters["is_causal"]
    for samples in (640, 333):
        x = torch.randn(3, samples, 64)
        torch.testing.assert_close(fused.module()(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_each_profile_has_another_length(length: str) -> None:
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    program = torch.export.export(Frames(LENGTHS[length]), (torch.randn(2, 640, 64),), dynamic_shapes=shapes)
    node = next(n for n in program.graph.nodes if "scaled_dot" in n.name)
    ask = Probe(program)
    met = [ask.evaluator(profile).sizes.shape(node)[2] for profile in range(3)]
    assert met[0] >= 3 and met[1] >= 3 and met[0] != met[1] and met[2] >= 1


def test_of_one_key_nothing_is_claimed() -> None:
    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, torch.ones(1, 1, dtype=torch.bool))

    x = torch.randn(2, 4, 1, 16)
    fused = fxfuse.fuse(torch.export.export(One(), (x,), dynamic_shapes=({0: Dim.AUTO},)))
    (entry,) = fxfuse.report(fused)
    assert entry.status == "fused" and not entry.parameters["is_causal"]
    torch.testing.assert_close(fused.module()(x), x)
