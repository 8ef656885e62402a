"""Small models of each kind that a fusion may go wrong in, and how they are judged: by their unfused program."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import fxfuse
from tests.adversaries.equal import difference

INF = float("inf")


class Model(nn.Module):
    """`function(*inputs, **buffers)`."""

    def __init__(self, function: Callable[..., Any], buffers: Mapping[str, Tensor], persistent: bool = False) -> None:
        super().__init__()
        self.function, self.names = function, list(buffers)
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=persistent)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, **{n: getattr(self, n) for n in self.names})


@dataclass
class Program:
    """What was captured, what was fused, and the entries of the report."""

    program: ExportedProgram
    fused: ExportedProgram
    entries: list[Any] = field(default_factory=list)

    @property
    def done(self) -> list[Any]:
        return [e for e in self.entries if e.status == "fused"]

    @property
    def said(self) -> str:
        return str(fxfuse.report(self.fused)) + " ".join(str(e.evidence) for e in self.entries)

    def is_causal(self) -> bool:
        return any(n.kwargs.get("is_causal") for n in self.fused.graph.nodes)


def fuse(model: nn.Module, inputs: Sequence[Tensor], dynamic: Sequence[Sequence[int]], **options: Any) -> Program:
    """Captured for these inputs, with these axes of each free."""
    shapes = tuple(dict.fromkeys(axes, Dim.AUTO) for axes in dynamic)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model.eval(), tuple(inputs), dynamic_shapes=(shapes,), strict=False)
        fused = fxfuse.fuse(program, **options)
    return Program(program, fused, list(fxfuse.report(fused)))


def check(made: Program, calls: Sequence[Sequence[Tensor]]) -> None:
    """Does the fused program compute what the unfused one does, element by element?"""
    compared = 0
    for inputs in calls:
        try:
            expected = run(made.program, inputs)
        except Exception:  # sizes that the program does not take
            continue
        compared += 1
        actual = run(made.fused, inputs)
        wrong = difference(made.program, tuple(inputs), expected, actual)
        assert wrong is None, f"{[tuple(t.shape) for t in inputs]}: {wrong}\n{made.said}"
    assert compared, "nothing was compared"


def sampled(cases: Mapping[str, Any], *beginnings: str) -> list[Any]:
    """Those that begin so by default, the others slow."""
    return [pytest.param(c, marks=() if c.startswith(beginnings) else pytest.mark.slow) for c in cases]


def run(program: ExportedProgram, inputs: Sequence[Tensor]) -> list[Tensor]:
    module: Any = program.module()
    with torch.no_grad():
        out = module(*(t.clone() for t in inputs))
    return list(out) if isinstance(out, (tuple, list)) else [out]


def drawn(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale


def qkv(length: int = 6, batch: int = 1, scale: float = 1.0, keys: int | None = None) -> list[Tensor]:
    sizes = (length, keys or length, keys or length)
    q, k, v = (drawn(batch, 2, n, 4, seed=s) for s, n in enumerate(sizes))
    return [q * scale, k * scale, v]


QKV = ((0, 2),) * 3


def rows(length: Any) -> tuple[Tensor, Tensor]:
    return torch.arange(length)[:, None], torch.arange(length)[None]


def attend(q: Tensor, k: Tensor, v: Tensor, scores=lambda s: s, weights=lambda w: w) -> Tensor:
    return weights(scores(q @ k.transpose(-1, -2) * 0.5).softmax(-1)) @ v


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def normed(x: Tensor, weight: Tensor, change=lambda m: m, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(change(x.pow(2).mean(-1, keepdim=True)) + eps) * weight


X = [drawn(1, n, 16) for n in (1, 6, 70, 150)] + [drawn(2, 5, 16, scale=s) for s in (1e-7, 1e-3, 1e3, 1e6)]
X.append(torch.cat([drawn(2, 5, 1, scale=1e6), drawn(2, 5, 15)], -1))
"""Rows of 16: of many lengths, of many sizes, and with one feature that is far larger than the others."""
