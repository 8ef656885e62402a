"""Norms that are no RMSNorm over the last axis: each is told what it is instead, and what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import fxfuse

WIDTH = 16
Function = Callable[[Tensor, Tensor], Tensor]


def rms(x: Tensor, axes: int | tuple[int, ...] = -1) -> Tensor:
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + 1e-6)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


TOLD: dict[str, tuple[Function, str]] = {
    "layer norm": (
        lambda x, w: centred(x) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * w,
        "",  # it is fused as what it is
    ),
    "uncentred": (lambda x, w: x * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5) * w, "by the standard deviation"),
    "standard deviation": (lambda x, w: x / x.std(-1, keepdim=True) * w, "by the standard deviation"),
    "channels": (lambda x, w: rms(x.transpose(1, 2), 1) * w[:, None], "over axis 1 of 3"),
    "channels of an image": (
        lambda x, w: F.normalize(x[..., None].movedim(2, 1), dim=1) * w[:, None, None],
        "axis 1 of 4",
    ),
    "the sequence": (lambda x, w: rms(x, 1) * w, "normalise x.movedim(1, -1) and move the result back"),
    "two axes": (lambda x, w: rms(x, (1, 2)) * w, "over axes 1, 2 together"),
    "a length that is free": (lambda x, w: rms(x.transpose(1, 2)), "no fixed size"),
    "a part": (lambda x, w: x * torch.rsqrt(x[..., :8].square().mean(-1, True) + 1e-6) * w, "one factor a position"),
    "a factor of the position": (
        lambda x, w: rms(x) * w * torch.arange(1.0, 7.0)[: x.shape[1], None].cumsum(0),
        "",  # the norm is fused, and the factor stays
    ),
    "of another": (
        lambda x, w: x.cumsum(-1) * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w,
        "it scales another one",
    ),
    "read alone": (lambda x, w: x.square().mean(-1, keepdim=True).sqrt() + w, "nothing is divided by it"),
    "an epsilon beside the root": (
        lambda x, w: x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-6) * w,
        "add it to the mean square instead",
    ),
}


class Norm(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


@pytest.mark.parametrize("case", TOLD)
def test_it_is_told_what_it_is(case: str) -> None:
    function, said = TOLD[case]
    x = torch.randn(2, 5, WIDTH)
    program = torch.export.export(Norm(function).eval(), (x,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    entries = list(fxfuse.report(fxfuse.fuse(program)))
    if said:
        assert [e.status for e in entries] == ["near miss"] and said in str(entries[0].reason)
    else:
        assert [e.status for e in entries] == ["fused"]


QUIET: dict[str, Function] = {
    "batch norm": lambda x, w: (x - w) * torch.rsqrt(w + 1e-5),
    "layer norm of torch": lambda x, w: F.layer_norm(x, (WIDTH,), w),
    "a distance": lambda x, w: torch.cdist(x, x),
    "a root": lambda x, w: (x.square() + 1).sqrt(),
}


@pytest.mark.parametrize("case", QUIET)
def test_what_is_none_at_all_is_not_spoken_of(case: str) -> None:
    program = torch.export.export(Norm(QUIET[case]).eval(), (torch.randn(2, 5, WIDTH),))
    assert not list(fxfuse.report(fxfuse.fuse(program)))
