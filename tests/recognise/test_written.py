"""Rotations that are written into a tensor, scores and masks that are written to in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import fxfuse
from fxfuse.graph.view import mutated

FREE = {0: Dim.AUTO, 2: Dim.AUTO}


class Model(nn.Module):
    def __init__(self, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.compute(*inputs)


def into_strides(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    y = torch.empty_like(x)
    a, b = x[..., 0::2], x[..., 1::2]
    y[..., 0::2] = a * c - b * s
    y[..., 1::2] = a * s + b * c
    return y


def into_halves(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    d = x.shape[-1] // 2
    y = x.new_empty(x.shape)
    y[..., :d] = x[..., :d] * c - x[..., d:] * s
    y[..., d:] = x[..., d:] * c + x[..., :d] * s
    return y


def into_zeros(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    d = x.shape[-1] // 2
    y[..., :d] += x[..., :d] * c
    y[..., :d] -= x[..., d:] * s
    y[..., d:].add_(x[..., d:] * c + x[..., :d] * s)
    return y


def into_pairs(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    pairs = x.unflatten(-1, (-1, 2))
    y = torch.empty(x.shape).view(pairs.shape)
    y[..., 0] = pairs[..., 0] * c - pairs[..., 1] * s
    y[..., 1] = pairs[..., 1] * c + pairs[..., 0] * s
    return y.flatten(-2)


def into_pieces(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    y = torch.empty_like(x)
    (a, b), (first, second) = x.chunk(2, -1), y.chunk(2, -1)
    first.copy_(a * c - b * s)
    second.copy_(b * c + a * s)
    return y


def over_a_copy(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """A part of the head is rotated, the rest stays."""
    y = x.clone()
    a, b = x[..., :4], x[..., 4:8]
    y[..., :4] = a * c[:, :4] - b * s[:, :4]
    y[..., 4:8] = b * c[:, :4] + a * s[:, :4]
    return y


def stacked_into(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    y = torch.empty(*a.shape, 2)
    torch.stack([a * c - b * s, b * c + a * s], -1, out=y)
    return y.flatten(-2)


def swapped_in_place(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """rotate_half written into a tensor, its first half negated in place."""
    d = x.shape[-1] // 2
    y = torch.empty_like(x)
    y[..., :d] = x[..., d:]
    y[..., d:] = x[..., :d]
    y[..., :d].neg_()
    return x * torch.cat([c, c], -1) + y.mul_(torch.cat([s, s], -1))


ROTATIONS = [
    into_strides,
    into_halves,
    into_zeros,
    into_pieces,
    into_pairs,
    over_a_copy,
    stacked_into,
    swapped_in_place,
]


@pytest.mark.parametrize("free", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("compute", ROTATIONS, ids=lambda f: f.__name__)
def test_a_rotation_written_into_a_tensor(compute: Callable[..., Tensor], free: bool) -> None:
    def inputs(batch: int, length: int) -> tuple[Tensor, ...]:
        angles = torch.randn(length, 8)
        return torch.randn(batch, 4, length, 16), angles.cos(), angles.sin()

    axes = ((FREE, {0: Dim.AUTO}, {0: Dim.AUTO}),) if free else None
    program = torch.export.export(Model(compute), inputs(2, 6), dynamic_shapes=axes)
    fused = fxfuse.fuse(program)
    assert fxfuse.report(fused).counts == {"RotaryEmbedding": 1}, fxfuse.report(fused)
    assert not any(mutated(n) for n in fused.graph.nodes)
    for given in [inputs(2, 6), *([inputs(3, 9)] if free else [])]:
        torch.testing.assert_close(fused.module()(*given), compute(*given), rtol=1e-5, atol=1e-5)


def half_is_left_out(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    d = x.shape[-1] // 2
    y[..., :d] = x[..., :d] * c - x[..., d:] * s
    y[..., d:-1] = (x[..., d:] * c + x[..., :d] * s)[..., :-1]
    return y


def written_over(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    y = into_halves(x, c, s)
    y[:, :, 0] = 0
    return y


def read_too_early(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """The second half reads what was written to the first."""
    d = x.shape[-1] // 2
    y = x.clone()
    y[..., :d] = y[..., :d] * c - y[..., d:] * s
    y[..., d:] = y[..., d:] * c + y[..., :d] * s
    return y


@pytest.mark.parametrize("compute", [half_is_left_out, written_over, read_too_early], ids=lambda f: f.__name__)
def test_what_is_nearly_one_is_none(compute: Callable[..., Tensor]) -> None:
    inputs = torch.randn(2, 4, 6, 16), torch.randn(6, 8), torch.randn(6, 8)
    program = torch.export.export(Model(compute), inputs, dynamic_shapes=((FREE, {0: Dim.AUTO}, {0: Dim.AUTO}),))
    fused = fxfuse.fuse(program)
    for length in (6, 3, 9):
        inputs = torch.randn(2, 4, length, 16), torch.randn(length, 8), torch.randn(length, 8)
        torch.testing.assert_close(fused.module()(*inputs), compute(*inputs), rtol=1e-5, atol=1e-5)


def triangle_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[2]
    w = (q @ k.transpose(-2, -1)) / 4
    w[:, :, :, -length:] += torch.full((length, length), float("-inf")).triu(1)
    return w.float().softmax(-1).type_as(q) @ v


def filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[2]
    w = torch.matmul(q, k.transpose(-2, -1)).mul_(0.25)
    w.masked_fill_(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
    return w.softmax(-1) @ v


def mask_by_assignment(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[2]
    mask = torch.zeros(length, length)
    mask[:, 1:] += torch.full((length, length), float("-inf")).triu(1)[:, 1:]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def prefix_by_assignment(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[2]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[:2, :2] = True
    k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k[:, :2], v[:, :2]))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def query_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.clone()
    q *= 0.25
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


SCORES: list[tuple[Callable[..., Tensor], dict[str, int]]] = [
    (triangle_added, {"is_causal": 1, "kv_num_heads": 4}),
    (filled, {"is_causal": 1, "kv_num_heads": 4}),
    (mask_by_assignment, {"is_causal": 1, "kv_num_heads": 4}),
    (prefix_by_assignment, {"is_causal": 0, "kv_num_heads": 2}),
    (query_scaled, {"is_causal": 0, "kv_num_heads": 4}),
]


@pytest.mark.parametrize("free", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize(("compute", "wanted"), SCORES, ids=[f.__name__ for f, _ in SCORES])
def test_attention_written_in_place(compute: Callable[..., Tensor], wanted: dict[str, int], free: bool) -> None:
    def inputs(batch: int, length: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(batch, 4, length, 16) for _ in range(3))

    axes = ((FREE, FREE, FREE),) if free else None
    fused = fxfuse.fuse(torch.export.export(Model(compute), inputs(2, 6), dynamic_shapes=axes))
    (entry,) = fxfuse.report(fused)
    assert entry.status == "fused" and entry.operator == "Attention", entry
    assert {name: entry.parameters[name] for name in wanted} == wanted
    for given in [inputs(2, 6), *([inputs(3, 9), inputs(1, 3)] if free else [])]:
        torch.testing.assert_close(fused.module()(*given), compute(*given), rtol=1e-5, atol=1e-5)
