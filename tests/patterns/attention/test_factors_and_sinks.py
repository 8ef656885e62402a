"""Factors of the scores are factors of q or k; one more in the denominator is a key of zeros."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from tests.patterns.attention.attentions import fused

HEADS, SIZE = 4, 8
DIMS = {0: Dim.AUTO, 2: Dim.AUTO}


def call(batch: int, s: int, t: int) -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(3)
    return tuple(torch.randn(batch, HEADS, n, SIZE, generator=gen) for n in (s, t, t))


class Scores(nn.Module):
    """softmax(way(q·kᵀ/√D))·v."""

    def __init__(self, way: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.scale = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.way(q @ k.transpose(-1, -2) / SIZE**0.5, self.scale) @ v


def padded(s: Tensor, _: Tensor) -> Tensor:
    return F.pad(s, (1, 0)).softmax(-1)[..., 1:]


def joined(s: Tensor, _: Tensor) -> Tensor:
    return torch.cat([s, torch.zeros_like(s[..., :1])], -1).softmax(-1)[..., :-1]


def written_out(s: Tensor, _: Tensor) -> Tensor:
    return s.exp() / (1 + s.exp().sum(-1, keepdim=True))


def less_the_largest(s: Tensor, _: Tensor) -> Tensor:
    largest = s.amax(-1, keepdim=True)
    return (s - largest).exp() / ((-largest).exp() + (s - largest).exp().sum(-1, keepdim=True))


@pytest.mark.parametrize("way", [padded, joined, written_out, less_the_largest])
def test_one_more_in_the_denominator_is_a_key_of_zeros(way: Callable[[Tensor, Tensor], Tensor]) -> None:
    (node,), report = fused(Scores(way), call(2, 6, 5), call(3, 4, 9), dims=DIMS)
    assert len(node.args) == 3 or node.args[3] is None  # its score is 0 by itself: no mask
    assert report.fused("Attention")[0].parameters["sinks"] == 0


def test_one_more_in_the_denominator_under_a_mask() -> None:
    def way(s: Tensor, _: Tensor) -> Tensor:
        seen = torch.ones(s.shape[-2:], dtype=torch.bool).tril()
        return padded(s.masked_fill(~seen, -torch.inf), s)

    (node,), _ = fused(Scores(way), call(2, 6, 6), call(3, 9, 9), dims=DIMS)
    assert node.args[3] is not None


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a head": lambda s, scale: (s * scale).softmax(-1),
    "a head, divided": lambda s, scale: (s / scale).softmax(-1),
    "a head, clamped and exponentiated": lambda s, scale: (s * scale.clamp(max=math.log(100)).exp()).softmax(-1),
    "a query": lambda s, _: (s * (torch.arange(s.shape[-2]) + 2.0).log()[:, None]).softmax(-1),
    "a key": lambda s, _: (s * (torch.arange(s.shape[-1]) + 2.0).log()).softmax(-1),
    "all": lambda s, scale: (s * scale[0, 0]).softmax(-1),
}


@pytest.mark.parametrize("name", WAYS)
def test_a_factor_is_one_of_q_or_k(name: str) -> None:
    nodes, report = fused(Scores(WAYS[name]), call(2, 6, 5), call(3, 4, 9), dims=DIMS)
    assert len(nodes) == 1
    assert len(report.fused("Attention")[0].parameters["factors"]) == 1


def test_a_factor_of_each_head_in_half_precision_rounds_no_worse() -> None:
    module = Scores(WAYS["a head"]).half()
    inputs = tuple(t.half() for t in call(2, 6, 5))
    import fxfuse

    program = fxfuse.fuse(torch.export.export(module, inputs))
    assert fxfuse.report(program).counts == {"Attention": 1}
    exact = Scores(WAYS["a head"])
    exact.load_state_dict(module.state_dict())
    want = exact.double()(*(t.double() for t in inputs))
    own, its = ((m(*inputs).double() - want).abs().max() for m in (module, program.module()))
    assert its <= 2 * own + 2**-11


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "a factor of each pair": (
        lambda s, _: (s * torch.outer(*(torch.arange(n) + 1.0 for n in s.shape[-2:])).cos()).softmax(-1),
        "varies over queries and keys",
    ),
    "weights that are gated": (lambda s, scale: s.softmax(-1) * scale, "multiplies them, and would have to multiply"),
    "a mask before the soft-cap": (
        lambda s, _: (30 * torch.tanh((s + torch.arange(s.shape[-1]) * -0.5) / 30)).softmax(-1),
        "caps first, and then adds its mask",
    ),
    "heads that talk": (
        lambda s, scale: torch.einsum("gh,bhij->bgij", scale[:, 0] * scale[:, 0].T, s).softmax(-1),
        "scores of different heads or positions are mixed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_factor_is_refused_with_what_it_is(name: str) -> None:
    way, why = REFUSED[name]
    nodes, report = fused(Scores(way), call(2, 6, 5), call(3, 4, 9), dims=DIMS)
    assert not nodes
    assert any(why in (entry.reason or "") for entry in report), report
