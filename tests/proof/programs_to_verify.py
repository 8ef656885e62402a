"""Small programs, each with what `fxfuse.verify` has to find again in a fusion of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node
from torchtune.models.llama3_2 import llama3_2

import fxfuse
from fxfuse.recognise.catalogue import catalogue, unregister
from fxfuse.state.lift import lift
from tests.decoder.test_growing import capture
from tests.patterns.cache_write.test_cache_write import Step
from tests.patterns.flex_attention.checks import program as flex_program
from tests.patterns.flex_attention.idioms import IDIOMS

FREE = {0: Dim.AUTO, 1: Dim.AUTO}
LONGEST = 16


class Block(nn.Module):
    """Norm, rotation, and attention within a window that a persistent buffer holds or that is computed."""

    def __init__(self, kept: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.last = nn.RMSNorm(32, eps=1e-5), nn.RMSNorm(32, eps=1e-6)
        self.qkv = nn.Linear(32, 96)
        self.kept = kept
        if kept:
            self.register_buffer("mask", torch.ones(LONGEST, LONGEST, dtype=torch.bool).tril())

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        angles = positions[:, None] * (torch.arange(4) * -0.5).exp()
        cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
        q, k = (t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin for t in (q, k))
        q.mul_(0.3)  # in place, of something that nothing else reads
        rows = torch.arange(x.shape[1])
        if self.kept:
            mask = self.mask[: x.shape[1], : x.shape[1]]
        else:
            mask = (rows[:, None] >= rows) & (rows[:, None] - rows < 5)
        y = (q @ k.transpose(-1, -2)).masked_fill(~mask, float("-inf")).softmax(-1) @ v
        return self.last(x + y.transpose(1, 2).flatten(2)), k


class NoGrad(nn.Module):
    """A norm, and what it is multiplied with under `no_grad`; then a layer there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.RMSNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            table = torch.arange(8).exp().reciprocal()
        y = self.norm(x) * table
        with torch.no_grad():
            z = self.linear(self.norm(y))
        return y + z


class Written(nn.Module):
    """Writes that nothing takes in: an input, a counter, a clone of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.register_buffer("count", torch.zeros(8))

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.count.clone()
        self.count.add_(x.sum((0, 1)))
        copy = x.clone()
        copy[:, 0] = self.count
        state.mul_(2.0)
        return self.norm(copy) + state, before


def llama() -> ExportedProgram:
    torch.manual_seed(0)
    model = llama3_2(
        vocab_size=32, num_layers=1, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=64, intermediate_dim=48
    ).eval()
    return torch.export.export(model, (torch.arange(10).reshape(2, 5),), dynamic_shapes={"tokens": FREE})


def block(kept: bool = False) -> ExportedProgram:
    args = torch.randn(2, 9, 32), torch.arange(9.0)
    return torch.export.export(Block(kept).eval(), args, dynamic_shapes=(FREE, {0: Dim.AUTO}))


def masked(symbol: str = "keys", most: int | None = None) -> ExportedProgram:
    """Attention with a mask that is an input."""

    class Masked(nn.Module):
        def forward(self, q: Any, k: Any, v: Any, mask: Any, other: Any) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, mask, scale=0.25) + other.any()

    q, mask = torch.randn(2, 2, 5, 8), torch.ones(5, 7, dtype=torch.bool)
    keys, longer = Dim(symbol, min=2, max=most), {2: Dim(symbol, min=2, max=most)}
    args = q, torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8), mask, mask.clone()
    return torch.export.export(Masked(), args, dynamic_shapes=(None, longer, longer, {1: keys}, {1: keys}))


def static_cache(write: str = "index_copy_") -> ExportedProgram:
    model = Step(write).eval().requires_grad_(False)
    args = torch.randn(1, 2, 16), torch.tensor([3])
    return torch.export.export(model, args, dynamic_shapes=({1: Dim("new", max=12)}, None))


def flex(name: str) -> Callable[[], ExportedProgram]:
    return lambda: flex_program(next(e for e in IDIOMS if e.name == name), dynamic=True)


def written() -> ExportedProgram:
    return torch.export.export(Written().eval(), (torch.randn(2, 3, 8), torch.randn(8)))


PROGRAMS: dict[str, tuple[Callable[[], ExportedProgram], set[str]]] = {
    "llama": (llama, {"RMSNormalization", "RotaryEmbedding", "Attention"}),
    "a window": (block, {"RMSNormalization", "RotaryEmbedding", "Attention"}),
    "a mask in a buffer": (lambda: block(True), {"RMSNormalization", "RotaryEmbedding", "Attention"}),
    "a mask that is an input": (masked, {"Attention"}),
    "growing cache": (lambda: capture("BHSD")[0], {"Attention", "KVCache"}),
    "growing cache, read twice": (lambda: capture("read twice")[0], {"Attention", "KVCache"}),
    "static cache, in place": (static_cache, {"Attention"}),
    "static cache, functional": (lambda: static_cache().run_decompositions({}), {"Attention", "TensorScatter"}),
    "static cache, lifted": (lambda: lift(static_cache("index_put_")).program, {"Attention", "TensorScatter"}),
    "under no_grad": (
        lambda: torch.export.export(NoGrad().eval(), (torch.randn(2, 3, 8),)),
        {"RMSNormalization"},
    ),
    "writes": (written, {"RMSNormalization"}),
    "flex, causal": (flex("causal"), {"Attention"}),
    "flex, documents": (flex("documents"), {"Attention"}),
    "flex, sinks": (flex("sinks by log-sum-exp"), {"Attention"}),
    "flex, primitives": (flex("clamped"), {"Attention"}),
}


@cache
def original(name: str) -> ExportedProgram:
    return PROGRAMS[name][0]()


@cache
def fused(name: str) -> ExportedProgram:
    return fxfuse.fuse(original(name))


def calls(program: ExportedProgram, name: str) -> list[Node]:
    return [n for n in program.graph.nodes if name in str(n.target) and n.op == "call_function"]


def tanh_gelu(approximate: str) -> tuple[Any, ExportedProgram]:
    """A pattern that nobody registered, right with ``"tanh"``, and a program to match."""

    @fxfuse.pattern(replacement=lambda x: torch.nn.functional.gelu(x, approximate=approximate))
    def gelu(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))

    class Gelu(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))

    (found,) = [p for p in catalogue() if p.name == "gelu"]
    unregister("gelu")
    return found, torch.export.export(Gelu(), (torch.randn(3, 4),))
