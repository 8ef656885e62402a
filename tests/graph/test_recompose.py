"""Programs after `run_decompositions()`: folded heads and a softmax taken apart are attention all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import fxfuse
from fxfuse.graph.program import copy_program
from fxfuse.graph.recompose import recompose, take_apart
from tests.unchanged import left_as_it_was

from .models import Layer

FREE = {0: Dim.AUTO, 2: Dim.AUTO}


def heads(batch: int = 2, length: int = 6, count: int = 4) -> Tensor:
    return torch.randn(batch, count, length, 16)


class Called(nn.Module):
    def __init__(self, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.compute(*inputs)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias * 0.25)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.25).softmax(-1) @ v


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t[:, :2].repeat_interleave(2, 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


CALLS = [plain, causal, masked, biased, written_out, repeated]


def decomposed(module: nn.Module, *inputs: Tensor, free: bool, **options: Any) -> ExportedProgram:
    axes: Any = dict.fromkeys(("q", "k", "v"), FREE) if isinstance(module, Layer) else ((FREE,) * len(inputs),)
    axes = axes if free else None
    return torch.export.export(module.eval(), inputs, dynamic_shapes=axes).run_decompositions(**options)


@pytest.mark.parametrize("free", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("compute", CALLS, ids=lambda f: f.__name__)
def test_attention_is_fused(compute: Callable[..., Tensor], free: bool) -> None:
    program = decomposed(Called(compute), heads(), heads(), heads(), free=free)
    fused = fxfuse.fuse(program)
    (entry,) = fxfuse.report(fused)
    assert entry.status == "fused" and entry.operator == "Attention", entry
    square = not free  # of two free lengths the mask is kept: what is causal then is not the same everywhere
    assert entry.parameters["is_causal"] == (square and compute in (causal, masked, repeated))
    assert entry.parameters["kv_num_heads"] == (2 if compute is repeated else 4)
    for sizes in ((2, 6), (3, 9), (1, 1)) if free else ((2, 6),):
        inputs = [heads(*sizes) for _ in range(3)]
        torch.testing.assert_close(fused.module()(*inputs), compute(*inputs), rtol=1e-5, atol=1e-5)


def test_a_whole_layer_is_fused() -> None:
    class Whole(Layer):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = (self.rotated(F.rms_norm(t, (16,), self.scale, 1e-6)) for t in (q, k))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    module, inputs = Whole(), [heads(), heads(), heads()]
    fused = fxfuse.fuse(decomposed(module, *inputs, free=True))
    assert fxfuse.report(fused).counts == {"RMSNormalization": 2, "RotaryEmbedding": 2, "Attention": 1}
    torch.testing.assert_close(fused.module()(*inputs), module(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compute", [causal, biased], ids=lambda f: f.__name__)
def test_a_backends_own_call_is_fused(compute: Callable[..., Tensor]) -> None:
    """The default table without what takes that call apart, as some back ends have it."""
    table = torch.export.default_decompositions()
    table.pop(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default)
    inputs = heads(), heads(), heads()
    program = decomposed(Called(compute), *inputs, free=False, decomp_table=table)
    assert any("_for_cpu" in str(n.target) for n in program.graph.nodes)
    with left_as_it_was(program):
        fused = fxfuse.fuse(program)
    assert fxfuse.report(fused).counts == {"Attention": 1}
    torch.testing.assert_close(fused.module()(*inputs), compute(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compute", CALLS, ids=lambda f: f.__name__)
def test_what_is_not_fused_leaves_as_it_came(compute: Callable[..., Tensor]) -> None:
    program = copy_program(decomposed(Called(compute), heads(), heads(), heads(), free=True))
    before = str(program.graph)
    found = recompose(program.graph)
    assert len(found) == (compute is not written_out)
    inputs = heads(), heads(), heads()
    program.graph.lint()
    program.graph_module.recompile()
    torch.testing.assert_close(program.module()(*inputs), compute(*inputs))
    take_apart(program.graph, found)
    assert str(program.graph) == before


def test_rows_that_are_hidden_otherwise_are_no_safe_softmax() -> None:
    """Where a row of −inf gives 1, where another row decides, and where the axis is another."""

    def ones(s: Tensor) -> Tensor:
        return torch.where((s == -torch.inf).all(-1, keepdim=True), 1.0, s.softmax(-1))

    def other(s: Tensor) -> Tensor:
        return torch.where((s == -torch.inf).all(-2, keepdim=True), 0.0, s.softmax(-1))

    def shifted(s: Tensor) -> Tensor:
        return torch.where((s + 1 == -torch.inf).all(-1, keepdim=True), 0.0, s.softmax(-1))

    def one_is_enough(s: Tensor) -> Tensor:
        return torch.where((s == -torch.inf).any(-1, keepdim=True), 0.0, s.softmax(-1))

    for compute in (ones, other, shifted, one_is_enough):
        for decompose in (True, False):
            program = torch.export.export(Called(compute), (torch.randn(3, 5),))
            program = copy_program(program.run_decompositions() if decompose else program)
            assert not recompose(program.graph), compute.__name__
