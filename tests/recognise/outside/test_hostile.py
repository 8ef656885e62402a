"""What nearly computes the same is left as it is, with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from tests.recognise.outside.models import Block, Int8, Mlp, Router
from tests.recognise.outside.test_fused import captured


class Silu(nn.Module):
    """Packed SwiGLU by another sigmoid: tanh of a half, cut off, or only approximated."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.projection, self.how = nn.Linear(16, 24, bias=False), how

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.projection(x).chunk(2, -1)
        if self.how == "cut off far out":
            gate = gate.clamp(-30.0, 30.0)
        if self.how == "hard":
            return F.hardswish(gate) * up
        if self.how == "quick":
            return F.gelu(gate) * up
        return gate * torch.sigmoid(gate) * up


class Biased(nn.Module):
    """Routing by scores with a bias for each expert; weights by the scores alone (DeepSeek-V3)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.bias = nn.Linear(16, 8, bias=False), nn.Parameter(torch.randn(8) * 1e-12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(x).softmax(-1)
        _, experts = (scores + self.bias).topk(2, dim=-1)
        weights = scores.gather(-1, experts)
        return weights / weights.sum(-1, keepdim=True), experts


class ByOtherNumbers(nn.Module):
    """The largest of other numbers, in an order that is another only where two are closer than a billionth: no draw
    shows it, for the weights are gathered."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = x.softmax(-1)
        order = scores * (1 + 1e-9 * torch.cos(50 * scores))
        experts = order.topk(2, dim=-1).indices
        weights = scores.gather(-1, experts)
        return weights / weights.sum(-1, keepdim=True), experts


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, experts = x.softmax(-1).topk(2, dim=-1, largest=False)
        return weights / weights.sum(-1, keepdim=True), experts


HOSTILE: dict[str, tuple[nn.Module, str, int, str | None]] = {
    "another constant in SiLU": (Mlp(beta=1.001), "packed_swiglu", 1, "nearly the same"),
    "pairs that are interleaved": (Mlp(axis=1), "packed_swiglu", 1, None),
    "GELU": (Silu("quick"), "packed_swiglu", 1, None),
    "hardswish": (Silu("hard"), "packed_swiglu", 1, "nearly the same"),
    "cut off at 30": (Silu("cut off far out"), "packed_swiglu", 1, "clamp"),
    "Bessel's correction": (Block(correction=1), "add_layer_norm", 2, "nearly the same"),
    "over the tokens": (Block(axis=1), "add_layer_norm", 2, None),
    "shifted after it is scaled": (Int8("shifted after"), "int8_linear", 1, None),
    "1e-6 more than the bytes": (Int8("a little more"), "int8_linear", 1, "nearly the same"),
    "bytes cut off at 100": (Int8("cut off"), "int8_linear", 1, None),
    "weights as they are": (Router(normalised=False), "route", 1, "a part of what route"),
    "only the experts are read": (Router(reads="experts"), "route", 1, "a part of what route"),
    "a factor for each expert": (Router(tie=1e-3), "route", 1, None),
    "a bias for each expert": (Biased(), "route", 1, None),
    "ordered by other numbers": (ByOtherNumbers(), "route", 1, "topk of numbers that are not known to be the same"),
    "the smallest": (Sorted(), "route", 1, None),
}
"""Model, pattern, number of inputs, and what is said of it, if it is near enough to be told."""


@pytest.mark.parametrize("case", HOSTILE)
def test_it_is_not_fused_and_the_reason_is_true(case: str) -> None:
    model, name, count, said = HOSTILE[case]
    report = fxfuse.report(fxfuse.fuse(captured(model, count)))
    assert not report.fused(name)
    reasons = [str(e.reason) for e in report if e.operator == name and e.status != "fused"]
    assert said is None or any(said in reason for reason in reasons), reasons


def test_the_operator_may_not_compute_something_else(patterns: dict[str, Any]) -> None:
    """The example is what the region computes, and the operator is off by a thousandth."""
    patterns["packed_swiglu"].unregister()

    def off(x: Tensor, weight: Tensor) -> Tensor:
        gate, up = (x @ weight.T).chunk(2, -1)
        return F.silu(gate * 1.001) * up

    wrong = fxfuse.pattern(replacement=off, operator="wrong")(patterns["packed_swiglu"].function)
    (entry,) = fxfuse.report(fxfuse.fuse(captured(Mlp(), 1), patterns=[wrong])).refused("wrong")
    wrong.unregister()
    assert "differs in float64" in str(entry.reason)
