"""Mods as people write them outside the catalogue: other types, other spellings, tables, searches, decoding."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.export import Dim
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention, or_masks

import fxfuse
import fxfuse.onnx
from tests.patterns.flex_attention.checks import check
from tests.patterns.flex_attention.idioms import HEADS, INF, LONGEST, SIZE, Entry, Mods, causal_mask


def score(function):
    return lambda m: Mods(score=function(m))


def mask(function):
    return lambda m: Mods(mask=function(m))


def by_difference(m):
    table = m.relative[:, 0, :].repeat(1, 2)
    return lambda s, b, h, q, kv: s + table[h, q - kv + LONGEST - 1]


def of_bytes(m):
    kinds = (m.document % 5).to(torch.uint8)
    return lambda b, h, q, kv: (kinds[q] - kinds[kv]) < 2


def of_small_integers(m):
    kinds = (m.document - 3).to(torch.int8)
    return lambda s, b, h, q, kv: s + kinds[q] * kinds[kv]


def of_bits(m):
    kinds = (m.packed % 4).to(torch.int32)
    return lambda b, h, q, kv: ((kinds[b, q] & kinds[b, kv]) != 0) | (q >= kv)


def in_doubles(m):
    slopes = m.slopes.double()
    return lambda s, b, h, q, kv: s + slopes[h] * (kv - q)


def searched(m):
    return lambda b, h, q, kv: (
        torch.searchsorted(m.offsets, q, right=True) == torch.searchsorted(m.offsets, kv, side="right")
    )


def counted(m):
    return lambda b, h, q, kv: (m.offsets <= q).sum() == (m.offsets <= kv).sum()


def in_a_plane(m):
    places = torch.stack([torch.arange(LONGEST) // 8, torch.arange(LONGEST) % 8], -1)
    return lambda s, b, h, q, kv: s - ((places[q] - places[kv]).float() ** 2).sum().sqrt() * m.slopes[h]


ONE_NODE = {
    "table by difference": score(by_difference),
    "from the end of a table": score(
        lambda m: lambda s, b, h, q, kv: s + m.buckets[h, -1 - (q - kv).abs().clamp(max=9)]
    ),
    "bytes that wrap": mask(of_bytes),
    "small integers": score(of_small_integers),
    "bits": mask(of_bits),
    "doubles": score(in_doubles),
    "a search": mask(searched),
    "a bucket": mask(lambda m: lambda b, h, q, kv: torch.bucketize(q, m.offsets) >= torch.bucketize(kv, m.offsets)),
    "a count": mask(counted),
    "a plane": score(in_a_plane),
    "a table in the mod": score(lambda m: lambda s, b, h, q, kv: s + torch.tensor([0.5, 1.0, 2.0, 3.0])[h] * (kv - q)),
    "two constants": score(lambda m: lambda s, b, h, q, kv: 1 - (2 - s)),
    "a product of booleans": mask(lambda m: lambda b, h, q, kv: (q >= kv) * (m.packed[b, q] == m.packed[b, kv])),
    "a sum of booleans": mask(lambda m: lambda b, h, q, kv: ((q >= kv).int() + m.is_global[kv].int()) >= 1),
    "exclusive or, negated": mask(lambda m: lambda b, h, q, kv: ~((q < kv) ^ m.is_global[kv]) | (q == kv)),
    "torch.logical": mask(
        lambda m: lambda b, h, q, kv: torch.logical_or(
            torch.logical_and(q >= kv, torch.logical_not(m.is_global[kv])),
            torch.logical_xor(m.bidirectional[b], kv == 0),
        )
    ),
    "a mask for each sequence": mask(
        lambda m: lambda b, h, q, kv: torch.where(m.bidirectional[b], q >= kv, kv < m.lengths[b])
    ),
    "combined combinations": mask(
        lambda m: or_masks(
            lambda b, h, q, kv: kv < m.lengths[b],
            and_masks(causal_mask, lambda b, h, q, kv: m.packed[b, q] == m.packed[b, kv]),
        )
    ),
    "a mask times -1e9": score(lambda m: lambda s, b, h, q, kv: s + (1.0 - (q >= kv).float()) * -1e9),
    "the logarithm of a mask": score(lambda m: lambda s, b, h, q, kv: s + torch.log((q >= kv).float())),
    "the logarithm of a gate": score(
        lambda m: lambda s, b, h, q, kv: s * m.per_query[q] * m.per_key[kv] + torch.log(m.per_key[kv])
    ),
    "nested": score(
        lambda m: lambda s, b, h, q, kv: torch.where(
            q >= kv, torch.where(m.packed[b, q] == m.packed[b, kv], s, s + m.slopes[h] * (kv - q)), -INF
        )
    ),
    "a remainder of either sign": mask(
        lambda m: lambda b, h, q, kv: (torch.fmod(q - kv, 4) == 0) | (torch.remainder(q - kv, 5) == 1) | (q == kv)
    ),
    "divisions": mask(
        lambda m: lambda b, h, q, kv: (
            (torch.div(q - kv, 4, rounding_mode="trunc") <= 0)
            | ((kv - q) // 4 <= -3)
            | (torch.floor(q / 4).int() == kv)
        )
    ),
    "shifts": mask(lambda m: lambda b, h, q, kv: (q >> 2) >= (kv >> 2)),
    "a head's kind": mask(
        lambda m: lambda b, h, q, kv: torch.where(h % 2 == 1, (q - kv < m.windows[h]) & (q >= kv), q >= kv)
    ),
    "an order of its own": mask(lambda m: lambda b, h, q, kv: (m.document[q] * 7) % 5 >= (m.document[kv] * 7) % 5),
    "a batch that sees nothing": mask(lambda m: lambda b, h, q, kv: m.bidirectional[b] & (q >= kv)),
}  # fmt: skip
WRITTEN_OUT = {
    "a finite fill": score(lambda m: lambda s, b, h, q, kv: torch.where(q >= kv, s, torch.finfo(torch.float32).min)),
    "tanh by a sigmoid": score(lambda m: lambda s, b, h, q, kv: 10 * (2 * torch.sigmoid(2 * s / 10) - 1)),
    "interpolated": score(lambda m: lambda s, b, h, q, kv: torch.lerp(s, s * 2, m.slopes[h])),
}
SAMPLE = ("bytes that wrap", "a search", "a table in the mod", "two constants", "the logarithm of a gate")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("case", "whole"),
    [
        pytest.param(case, whole, marks=() if name in SAMPLE else pytest.mark.slow, id=name)
        for cases, whole in ((ONE_NODE, True), (WRITTEN_OUT, False))
        for name, case in cases.items()
    ],
)
def test_is_what_eager_computes(case, whole):
    """Batch and length free, at the exported length and another, in PyTorch and in ONNX Runtime."""
    pytest.importorskip("onnxruntime")
    outcome = check(Entry("", "", case), dynamic=True, opset=24)
    assert outcome.whole == whole, outcome.encoding
    assert outcome.error < 1e-5


class Decoder(nn.Module):
    """q [B, 4, 1, 8] against k and v [B, 4, T, 8]; `length` [B], `start` []."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, q, k, v, length, start):
        seen = self.seen(length, start, k)
        mask = create_block_mask(seen, q.shape[0], None, q.shape[2], k.shape[2], device="cpu")
        return flex_attention(q, k, v, block_mask=mask)


DECODERS = {
    "an offset that is a tensor": lambda length, start, k: lambda b, h, q, kv: q + start >= kv,
    "a length for each sequence": lambda length, start, k: lambda b, h, q, kv: q + length[b] - 1 >= kv,
    "a window before each length": lambda length, start, k: (
        lambda b, h, q, kv: (q + length[b] - 1 >= kv) & (q + length[b] - kv <= 3)
    ),
    "a size's remainder": lambda length, start, k: lambda b, h, q, kv: (q + kv + start) % k.shape[2] != 1,
}


@pytest.mark.parametrize("seen", DECODERS.values(), ids=DECODERS)
def test_one_query_against_a_cache(seen):
    ort = pytest.importorskip("onnxruntime")

    def inputs(b, t):
        draw = torch.Generator().manual_seed(t)
        q, k, v = (torch.randn(b, HEADS, n, SIZE, generator=draw) for n in (1, t, t))
        return q, k, v, torch.arange(b) * 2 + 3, torch.tensor(5)

    b = Dim.DYNAMIC
    model, free = Decoder(seen), ({0: b}, {0: b, 2: b}, {0: b, 2: b}, {0: b}, None)
    with fxfuse.flex_capture(), torch.no_grad():
        program = torch.export.export(model, inputs(2, 9), dynamic_shapes=free)
    fused = fxfuse.fuse(program)
    assert [e.status for e in fxfuse.report(fused)] == ["fused"]
    proto = fxfuse.onnx.export(fused).model_proto
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for args in (inputs(2, 9), inputs(4, 23)):
        given = dict(zip(("q", "k", "v", "length", "start"), args, strict=True))
        feed = {i.name: given[i.name].numpy() for i in session.get_inputs()}
        with torch.no_grad():
            expected = model(*args)
            torch.testing.assert_close(fused.module()(*args), expected, rtol=1e-5, atol=2e-6)
        (ran,) = session.run(None, feed)
        torch.testing.assert_close(torch.from_numpy(ran), expected, rtol=1e-5, atol=2e-6)
