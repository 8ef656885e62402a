"""Captured tensors that only count (positions, samples of a pack) are read as what they are, and no others."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.export import Dim
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fxfuse
from fxfuse.graph.view import op_name

FREE = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}


def counted(x):
    b, s = x.shape[0], x.shape[2]
    return torch.arange(s).unsqueeze(0).expand(b, -1)


def packs(positions):
    """As transformers tells the samples of a pack by their position ids [B, S]."""
    first = positions[:, :1] - 1
    return (torch.diff(positions, prepend=first, dim=-1) != 1).cumsum(-1)


def written(x):
    positions = counted(x).clone()
    positions[:, 2] = 0
    return positions


def by_positions(positions):
    def mask(b, h, q, kv):
        return positions[b, kv] <= positions[b, q]

    return mask


def within(samples):
    def mask(b, h, q, kv):
        return (samples[b, q] == samples[b, kv]) & (q >= kv)

    return mask


def from_the_end(positions):
    def mask(b, h, q, kv):
        return positions[b, q - 1] >= positions[b, kv]

    return mask


CAUSAL = {
    "positions": lambda x: by_positions(counted(x)),
    "positions from 3 on": lambda x: by_positions(3 + counted(x)),
    "positions counted up": lambda x: by_positions(torch.ones(x.shape[0], x.shape[2], dtype=torch.int64).cumsum(1)),
    "one sample": lambda x: within(packs(counted(x))),
    "one sample, from 5 on": lambda x: within(packs((counted(x) + 6)[:, :] - 1)),
    "a table of the tail": lambda x: by_positions(torch.arange(x.shape[2] + 4)[4:].expand(x.shape[0], -1)),
}
OTHERS = {
    "backwards": lambda x: by_positions(7 - counted(x)),
    "halved": lambda x: by_positions(counted(x) // 2),
    "counted by query and batch": lambda x: by_positions(counted(x) + torch.arange(x.shape[0])[:, None]),
    "written to": lambda x: by_positions(written(x)),
    "two samples": lambda x: within(packs(counted(x) % 5)),
    "samples of written positions": lambda x: within(packs(written(x))),
    "an odd first": lambda x: within((torch.diff(counted(x), prepend=counted(x)[:, :1], dim=-1) != 1).cumsum(-1)),
    "data": lambda x: within((x[:, 0, :, 0] > 1).cumsum(-1)),
    "from the end": lambda x: from_the_end(counted(x)),
}


class Model(nn.Module):
    """q, k and v [B, 2, S, 8]."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, q, k, v):
        mask = create_block_mask(self.mask(q), q.shape[0], None, q.shape[2], k.shape[2], device="cpu")
        return flex_attention(q, k, v, block_mask=mask)


def inputs(b, s):
    draw = torch.Generator().manual_seed(s)
    return tuple(torch.randn(b, 2, s, 8, generator=draw) for _ in range(3))


@pytest.mark.parametrize(
    ("mask", "causal"),
    [
        *(pytest.param(m, True, id=n) for n, m in CAUSAL.items()),
        *(pytest.param(m, False, id=n) for n, m in OTHERS.items()),
    ],
)
def test_what_only_counts_is_an_index(mask, causal):
    torch._dynamo.reset()
    model = Model(mask)
    with fxfuse.flex_capture(), torch.no_grad():
        program = torch.export.export(model, inputs(2, 9), dynamic_shapes=(FREE,) * 3)
    fused = fxfuse.fuse(program)
    (entry,) = fxfuse.report(fused)
    assert entry.status == "fused"
    if causal:
        assert entry.parameters["is_causal"] and "boolean mask" not in entry.parameters
        left = {op_name(n) for n in fused.graph.nodes}
        assert "attention" in left and not left & {"expand", "diff", "cumsum", "index", "ge", "le", "eq", "logical_and"}
    with torch.no_grad():
        for args in (inputs(2, 9), inputs(3, 21)):
            torch.testing.assert_close(fused.module()(*args), model(*args), rtol=1e-5, atol=2e-6)


def test_calls_that_differ_in_what_counts_are_told_apart():
    """The same mask function, once of positions and once of data: one answer is not taken for the other."""

    class Two(Model):
        def forward(self, q, k, v):
            return super().forward(q, k, v) + Model(OTHERS["data"])(q, k, v) + Model(CAUSAL["one sample"])(q, k, v)

    model = Two(OTHERS["data"])
    with fxfuse.flex_capture(), torch.no_grad():
        program = torch.export.export(model, inputs(2, 9), dynamic_shapes=(FREE,) * 3)
    fused = fxfuse.fuse(program)
    assert ["boolean mask" in e.parameters for e in fxfuse.report(fused)] == [True, True, False]
    with torch.no_grad():
        torch.testing.assert_close(fused.module()(*inputs(3, 21)), model(*inputs(3, 21)), rtol=1e-5, atol=5e-6)
