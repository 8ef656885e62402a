"""Rotations in rare spellings, which fuse; and what is shaped like one and is none, which is told why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxfuse

WIDTH = 16


def swapped(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    angles = torch.cat([angles, angles], -1)
    return x * angles.cos() + swapped(x) * angles.sin()


def angles(length: int, base: float = 1e4) -> Tensor:
    return torch.outer(torch.arange(length).float(), base ** (-torch.arange(0, WIDTH, 2) / WIDTH))


class Rotated(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        full = torch.cat([angles(64)] * 2, -1)
        self.register_buffer("cos", full.cos(), persistent=False)
        self.register_buffer("sin", full.sin(), persistent=False)
        self.register_buffer("unequal", full.cos() * torch.linspace(1, 1.1, WIDTH), persistent=False)

    def forward(self, x: Tensor, *tables: Tensor) -> Tensor:
        return self.function(self, x, *tables)


def conjugated(m: Rotated, x: Tensor) -> Tensor:
    turns = torch.polar(torch.ones(x.shape[2], WIDTH // 2), angles(x.shape[2])).conj()
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)


def by_a_matrix(m: Rotated, x: Tensor) -> Tensor:
    """The halves are swapped by a matrix that forward makes."""
    swap = torch.zeros(WIDTH, WIDTH)
    swap[range(8, 16), range(8)], swap[range(8), range(8, 16)] = -1, 1
    return x * m.cos[: x.shape[2]] + (x @ swap) * m.sin[: x.shape[2]]


def base_that_grows(m: Rotated, x: Tensor) -> Tensor:
    base = 1e4 * torch.sym_max(1, x.shape[2] // 8) ** 1.1
    return turned(x, torch.arange(x.shape[2]).float()[:, None] / base ** (torch.arange(0, WIDTH, 2) / WIDTH))


def scaled_tables(m: Rotated, x: Tensor) -> Tensor:
    cos, sin = m.cos[: x.shape[2]] * 0.5, 0.5 * m.sin[: x.shape[2]]
    return x * cos + swapped(x) * sin


def one_angle_a_position(m: Rotated, x: Tensor) -> Tensor:
    at = torch.arange(x.shape[2]).float()[:, None]
    return x * at.cos() + swapped(x) * at.sin()


FUSED = [conjugated, by_a_matrix, base_that_grows, scaled_tables, one_angle_a_position]
AXES = {0: Dim.AUTO, 2: Dim.AUTO}


@pytest.mark.parametrize("function", FUSED, ids=lambda f: f.__name__)
def test_rare_spellings_fuse(function: Callable[..., Tensor]) -> None:
    model = Rotated(function).eval()
    made = fxfuse.fuse(torch.export.export(model, (torch.randn(2, 3, 12, WIDTH),), dynamic_shapes=(AXES,)))
    assert fxfuse.report(made).counts == {"RotaryEmbedding": 1}
    for length in (12, 33):
        x = torch.randn(1, 3, length, WIDTH)
        torch.testing.assert_close(made.module()(x), model(x), rtol=1e-4, atol=1e-4)


TOLD = {
    "unequal halves": (
        lambda m, x: x * m.unequal[: x.shape[2]] + swapped(x) * m.sin[: x.shape[2]],
        "the buffer 'unequal' holds",
    ),
    "a reflection": (
        lambda m, x: x * m.cos[: x.shape[2]] + torch.cat(x.chunk(2, -1)[::-1], -1) * m.sin[: x.shape[2]],
        "a reflection",
    ),
    "scaled by itself": (lambda m, x: turned(x, angles(x.shape[2])) * x.norm(dim=-1, keepdim=True), ""),
    "pairs of another order": (
        lambda m, x: x * m.cos[: x.shape[2]] + x.unflatten(-1, (4, 4)).flip(-1).flatten(-2) * m.sin[: x.shape[2]],
        "neither halves nor neighbours",
    ),
}


@pytest.mark.parametrize("case", TOLD)
def test_it_is_told_why_not(case: str) -> None:
    function, said = TOLD[case]
    program = torch.export.export(Rotated(function).eval(), (torch.randn(2, 3, 12, WIDTH),), dynamic_shapes=(AXES,))
    (entry, *_) = fxfuse.report(fxfuse.fuse(program))
    if said:
        assert entry.status == "near miss" and said in str(entry.reason)
    else:  # the rotation is fused, and the factor stays
        assert entry.status == "fused"


def test_whole_tables_that_are_given_are_named() -> None:
    model = Rotated(lambda m, x, cos, sin: x * cos + swapped(x) * sin).eval()
    args = torch.randn(2, 3, 12, WIDTH), torch.randn(12, WIDTH), torch.randn(12, WIDTH)
    (entry,) = fxfuse.report(fxfuse.fuse(torch.export.export(model, args)))
    assert "which may hold anything (pass cos and sin of half the width" in str(entry.reason)
