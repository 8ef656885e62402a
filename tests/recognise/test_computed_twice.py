"""A formula whose parts cut x out, cast it or compute it anew: it is one x, and what else reads it stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxfuse

LENGTH, WIDTH = 12, 16


def swapped(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def inverse(x: Tensor) -> Tensor:
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).type_as(x)


class Twice(nn.Module):
    """`one(x)` in one half of the formula, `two(x)` in the other."""

    def __init__(self, formula: str, one: Callable[[Tensor], Tensor], two: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.formula, self.one, self.two = formula, one, two
        angles = torch.outer(torch.arange(64.0), 100 ** (-torch.arange(8) / 8))
        self.register_buffer("cos", torch.cat([angles.cos()] * 2, -1), persistent=False)
        self.register_buffer("sin", torch.cat([angles.sin()] * 2, -1), persistent=False)
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x), self.two(x)
        if self.formula == "norm":
            return one * inverse(two) * self.weight
        if self.formula == "attention":
            return (one - one.amax(-1, keepdim=True)).exp() / (two - two.amax(-1, keepdim=True)).exp().sum(-1, True) @ x
        return one * self.cos[: x.shape[2]] + swapped(two) * self.sin[: x.size(-2)]


CUTS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "slices": (lambda x: x[:, 1:], lambda x: x[:, 1:]),
    "an end that is written": (lambda x: x[:, 1:], lambda x: x[:, 1:4]),
    "from behind": (lambda x: x[:, 1:], lambda x: x[:, -3:]),
    "narrow": (lambda x: x[:, 1:3], lambda x: x.narrow(1, 1, 2)),
    "pieces of two splits": (lambda x: x.split([1, 3], 1)[1], lambda x: x.split([1, 3], 1)[1]),
    "split and chunk": (lambda x: x.split(2, 1)[1], lambda x: x.chunk(2, 1)[1]),
    "select and unbind": (lambda x: x.select(-3, 1), lambda x: x.unbind(1)[1]),
    "views": (
        lambda x: x.reshape(x.shape[0], 2, -1, x.shape[2], WIDTH)[:, 1],
        lambda x: x.reshape(x.size(0), 2, 2, x.size(2), -1)[:, 1],
    ),
    "transposes": (
        lambda x: x[:, 1:].transpose(0, 1).transpose(0, 1),
        lambda x: x[:, 1:].permute(1, 0, 2, 3).permute(1, 0, 2, 3),
    ),
    "arithmetic": (lambda x: x[:, 1:] * 2 + 1, lambda x: x[:, 1:] * 2 + 1),
    "casts of a part": (lambda x: x[:, 1:].double().float(), lambda x: x[:, 1:].to(torch.float64).type_as(x)),
}


def fused(module: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, int]]:
    x = torch.randn(2, 4, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    module = module.eval().to(dtype)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: Dim.AUTO, 2: Dim.AUTO},))
    made = fxfuse.fuse(program)
    close = {"rtol": 1e-5 if dtype == torch.float32 else 1e-2, "atol": 1e-5}
    for value in (x, torch.randn(3, 4, 7, WIDTH).to(dtype)):
        torch.testing.assert_close(made.module()(value), module(value), **close)
    return made, {k: v for k, v in fxfuse.report(made).counts.items() if v}


@pytest.mark.parametrize("cut", CUTS)
def test_a_rotation_of_what_is_cut_out_twice(cut: str) -> None:
    assert fused(Twice("rotation", *CUTS[cut]))[1] == {"RotaryEmbedding": 1}


@pytest.mark.parametrize("cut", ["slices", "from behind", "arithmetic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_norm_of_what_is_cut_out_twice(cut: str, dtype: torch.dtype) -> None:
    assert fused(Twice("norm", *CUTS[cut]), dtype)[1] == {"RMSNormalization": 1}


def test_an_attention_whose_scores_are_computed_twice() -> None:
    def scores(x: Tensor) -> Tensor:
        return x @ x.transpose(-1, -2) * 0.25

    assert fused(Twice("attention", scores, scores))[1] == {"Attention": 1}


def test_other_cuts_are_others() -> None:
    assert fused(Twice("rotation", lambda x: x[:, 1:], lambda x: x[:, :-1]))[1] == {}
    assert fused(Twice("norm", lambda x: x[:, 1:], lambda x: x[:, :3]))[1] == {}


class TwoNorms(nn.Module):
    """They begin alike, and each is a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (x * inverse(x) * self.one) @ (x * inverse(x) * self.two).transpose(-1, -2)


def test_two_norms_of_one_x_stay_two() -> None:
    assert fused(TwoNorms())[1] == {"RMSNormalization": 2}


class ReadElsewhere(Twice):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x[:, 1:].cumsum(-1), x[:, 1:]


def test_what_else_reads_it_stays_as_it_was() -> None:
    module = ReadElsewhere("rotation", *CUTS["slices"])
    made, counts = fused(module)
    assert counts == {"RotaryEmbedding": 1}
    (cumsum,) = (n for n in made.graph.nodes if n.target is torch.ops.aten.cumsum.default)
    (rotated,) = (n for n in made.graph.nodes if n.target is torch.ops.fxfuse.rotary_embedding.default)
    assert cumsum.args[0] is not rotated.args[0]
    assert not any("fxfuse_merged" in n.meta for n in made.graph.nodes)


class Written(Twice):
    """The second cut is taken after x was written to."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        one = y[:, 1:] * self.cos[: x.shape[2]]
        y.add_(1)
        return one + swapped(y[:, 1:]) * self.sin[: x.shape[2]]


def test_what_is_written_to_in_between_is_another() -> None:
    assert fused(Written("rotation", *CUTS["slices"]))[1] == {}


class CastAndRead(Twice):
    def forward(self, x: Tensor) -> Any:
        one, two = (x[:, 1:].double() for _ in range(2))
        return one * self.cos[: x.shape[2]] + swapped(two) * self.sin[: x.shape[2]], x[:, 1:]


def test_nothing_is_left_that_nobody_reads() -> None:
    made, counts = fused(CastAndRead("rotation", *CUTS["slices"]))
    assert counts == {"RotaryEmbedding": 1}
    calls = [n for n in made.graph.nodes if n.op == "call_function" and "_assert" not in str(n.target)]
    assert all(n.users for n in calls)
