"""A user's pattern, from outside the package: what it computes, and an op of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import fxfuse
from fxfuse.recognise.catalogue import catalogue, unregister


@torch.library.custom_op("fxfuse_tests::geglu", mutates_args=())
def geglu_op(x: torch.Tensor, w_gate: torch.Tensor, w_up: torch.Tensor) -> torch.Tensor:
    return F.gelu(x @ w_gate.T) * (x @ w_up.T)


@geglu_op.register_fake
def _(x: torch.Tensor, w_gate: torch.Tensor, w_up: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], w_gate.shape[0])


@torch.library.custom_op("fxfuse_tests::add_layer_norm", mutates_args=())
def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
) -> torch.Tensor:
    return F.layer_norm(x + residual, weight.shape, weight, bias, epsilon)


@add_layer_norm.register_fake
def _(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
) -> torch.Tensor:
    return torch.empty_like(x)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The two patterns, as a user writes them."""

    @fxfuse.pattern(replacement=geglu_op)
    def geglu(x, w_gate, w_up):  # type: ignore[no-untyped-def]
        return F.gelu(x @ w_gate.T) * (x @ w_up.T)

    @fxfuse.pattern(replacement=add_layer_norm, operator="AddLayerNorm")
    def residual_norm(x, residual, weight, bias, epsilon=1e-5):  # type: ignore[no-untyped-def]
        return F.layer_norm(x + residual, weight.shape, weight, bias, epsilon)

    yield
    unregister("geglu")
    unregister("residual_norm")


class Mlp(nn.Module):
    """GeGLU by linear layers and erf; LayerNorm written out, with an epsilon of its own."""

    def __init__(self, epsilon: float = 3e-4, approximate: bool = False) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24, False), nn.Linear(16, 24, False), nn.Linear(24, 16, False)
        self.weight, self.bias = nn.Parameter(torch.rand(16) + 0.5), nn.Parameter(torch.randn(16))
        self.epsilon, self.approximate = epsilon, approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        g = self.gate(x)
        g = F.gelu(g, approximate="tanh") if self.approximate else 0.5 * g * (1 + torch.erf(g * 0.7071067811865476))
        h = self.down(self.up(x) * g) + x
        centred = h - h.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + self.epsilon) * self.weight + self.bias


def fused(module: nn.Module) -> torch.export.ExportedProgram:
    x = torch.randn(2, 5, 16)
    program = torch.export.export(module.eval(), (x,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},), strict=False)
    return fxfuse.fuse(program)


def test_a_pattern_by_example_matches_another_spelling() -> None:
    module = Mlp()
    program = fused(module)
    assert fxfuse.report(program).counts == {"geglu": 1, "AddLayerNorm": 1}
    x = torch.randn(3, 4, 16)
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-5, atol=1e-5)


def test_every_layer_of_a_stack_is_matched() -> None:
    """However much of the model lies behind it."""
    stack = nn.Sequential(*(Mlp() for _ in range(4)))
    assert fxfuse.report(fused(stack)).counts["geglu"] == 4


@pytest.mark.parametrize("epsilon", [1e-5, 3e-4, 0.1])
def test_numbers_are_bound_to_those_of_the_region(epsilon: float) -> None:
    (entry,) = fxfuse.report(fused(Mlp(epsilon))).fused("AddLayerNorm")
    assert entry.parameters["epsilon"] == epsilon


def test_a_near_miss_is_told_not_fused() -> None:
    report = fxfuse.report(fused(Mlp(approximate=True)))
    assert not report.fused("geglu")
    assert any("nearly the same as geglu" in str(e.reason) for e in report.near_misses("geglu"))


def test_registered_patterns_are_in_the_catalogue_once() -> None:
    names = [p.name for p in catalogue()]
    assert names.count("geglu") == 1 and {"rms_norm", "rotary_embedding", "attention"} <= set(names)


def test_bad_examples() -> None:
    with pytest.raises(fxfuse.FxfuseError, match="cannot be called"):
        fxfuse.pattern(replacement="geglu")  # type: ignore[arg-type]
    with pytest.raises(fxfuse.FxfuseError, match="named parameters"):
        fxfuse.pattern(replacement=geglu_op)(lambda *args: args[0])


def test_a_wrong_replacement_is_refused() -> None:
    @fxfuse.pattern(replacement=lambda x, w, u: F.silu(x @ w.T) * (x @ u.T), operator="wrong")
    def geglu(x, w_gate, w_up):  # type: ignore[no-untyped-def]
        return F.gelu(x @ w_gate.T) * (x @ w_up.T)

    (entry,) = fxfuse.report(fused(Mlp())).refused("wrong")
    assert entry.reason is not None and "differs in float64" in entry.reason
