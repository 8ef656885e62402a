"""Mods that look like something simple and are not: none becomes an Attention that computes something else."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch.export import Dim

import fxfuse
from tests.patterns.flex_attention.idioms import HEADS, INF, LONGEST, SIZE, Idiom, Mods

SHAPES = ((1, 1), (2, 9), (3, LONGEST))

# What is no scaled, capped or biased score, though it is one for most scores: must not be one node.
NOT_ATTENTION = {
    "clamp far out": lambda m: Mods(score=lambda s, b, h, q, kv: s.clamp(-50, 50)),
    "clamp from above": lambda m: Mods(score=lambda s, b, h, q, kv: s.clamp(max=30.0)),
    "minimum": lambda m: Mods(score=lambda s, b, h, q, kv: torch.minimum(s, torch.full_like(s, 30.0))),
    "relu": lambda m: Mods(score=lambda s, b, h, q, kv: torch.relu(s)),
    "leaky": lambda m: Mods(score=lambda s, b, h, q, kv: torch.where(s > 0, s, 0.9 * s)),
    "mask by the score": lambda m: Mods(score=lambda s, b, h, q, kv: torch.where(s > -3, s, -INF)),
    "mask by a large score": lambda m: Mods(score=lambda s, b, h, q, kv: s.masked_fill(s > 40, -INF)),
    "nearly linear": lambda m: Mods(score=lambda s, b, h, q, kv: s + 1e-3 * s * s),
    "odd cube": lambda m: Mods(score=lambda s, b, h, q, kv: s - 1e-3 * s * s * s),
    "absolute": lambda m: Mods(score=lambda s, b, h, q, kv: s.abs()),
    "rounded": lambda m: Mods(score=lambda s, b, h, q, kv: torch.round(s * 8) / 8),
    "integer": lambda m: Mods(score=lambda s, b, h, q, kv: s.to(torch.int32).to(torch.float32)),
    "atan, nearly tanh": lambda m: Mods(score=lambda s, b, h, q, kv: 5 * torch.atan(s / 5)),
    "tanh of tanh": lambda m: Mods(score=lambda s, b, h, q, kv: 5 * torch.tanh(torch.tanh(s / 5))),
    "cap by head": lambda m: Mods(score=lambda s, b, h, q, kv: torch.tanh(s / (h + 2)) * (h + 2)),
    "cap of a bias": lambda m: Mods(score=lambda s, b, h, q, kv: 5 * torch.tanh((s + 0.1 * (q - kv)) / 5)),
    "cap of a mask": lambda m: Mods(score=lambda s, b, h, q, kv: 5 * torch.tanh(torch.where(q >= kv, s, -INF) / 5)),
    "cap plus score": lambda m: Mods(score=lambda s, b, h, q, kv: torch.tanh(s) + 0.5 * s),
    "clamp in one head": lambda m: Mods(score=lambda s, b, h, q, kv: torch.where(h == 1, s.clamp(-1, 1), s)),
    "twice on the diagonal": lambda m: Mods(score=lambda s, b, h, q, kv: torch.where(q == kv, 2 * s, s)),
    "distance": lambda m: Mods(score=lambda s, b, h, q, kv: s * torch.cos((q - kv) * 0.1)),
    "sum that is no product": lambda m: Mods(score=lambda s, b, h, q, kv: s * (m.per_query[q] + m.per_key[kv])),
    "finite fill": lambda m: Mods(score=lambda s, b, h, q, kv: torch.where(q > kv, s, -1e9)),
    "a mask, times what may be negative": lambda m: Mods(
        score=lambda s, b, h, q, kv: torch.where(q >= kv, s, -INF) * (m.temperature[h])
    ),
    "bias that the score chooses": lambda m: Mods(
        score=lambda s, b, h, q, kv: s + m.sinks[(s > 0).to(torch.int64) + h // 2]
    ),
}

# One node or not: what it computes has to be the same.
EDGES = {
    "q > kv": lambda m: Mods(mask=lambda b, h, q, kv: q > kv),
    "q + 1 > kv": lambda m: Mods(mask=lambda b, h, q, kv: q + 1 > kv),
    "q >= kv + 1": lambda m: Mods(mask=lambda b, h, q, kv: q >= kv + 1),
    "q >= kv - 1": lambda m: Mods(mask=lambda b, h, q, kv: q >= kv - 1),
    "q - kv > -1": lambda m: Mods(mask=lambda b, h, q, kv: q - kv > -1),
    "kv - q <= 0": lambda m: Mods(mask=lambda b, h, q, kv: kv - q <= 0),
    "kv - q < 0": lambda m: Mods(mask=lambda b, h, q, kv: kv - q < 0),
    "not kv > q": lambda m: Mods(mask=lambda b, h, q, kv: ~(kv > q)),
    "not q > kv": lambda m: Mods(mask=lambda b, h, q, kv: ~(q > kv)),
    "not (kv > q or far)": lambda m: Mods(mask=lambda b, h, q, kv: ~((kv > q) | (q - kv > 30))),
    "0 >= kv - q": lambda m: Mods(mask=lambda b, h, q, kv: kv - q <= 0),
    "-q <= -kv": lambda m: Mods(mask=lambda b, h, q, kv: -q <= -kv),
    "2 q >= 2 kv": lambda m: Mods(mask=lambda b, h, q, kv: 2 * q >= 2 * kv),
    "2 q >= kv": lambda m: Mods(mask=lambda b, h, q, kv: 2 * q >= kv),
    "q + q >= kv + kv": lambda m: Mods(mask=lambda b, h, q, kv: q + q >= kv + kv),
    "q >= kv in floats": lambda m: Mods(mask=lambda b, h, q, kv: q * 1.0 >= kv - 0.5),
    "half a step": lambda m: Mods(mask=lambda b, h, q, kv: q - kv >= 0.5),
    "alpha": lambda m: Mods(mask=lambda b, h, q, kv: torch.sub(q, kv, alpha=2) >= 0),
    "both ways": lambda m: Mods(mask=lambda b, h, q, kv: (q >= kv) & (q <= kv)),
    "h >= kv": lambda m: Mods(mask=lambda b, h, q, kv: h >= kv),
    "q clamped": lambda m: Mods(mask=lambda b, h, q, kv: q.clamp(max=20) >= kv),
    "q modulo": lambda m: Mods(mask=lambda b, h, q, kv: q % 40 >= kv % 40),
    "window of 31": lambda m: Mods(mask=lambda b, h, q, kv: (q >= kv) & (q - kv < 31)),
    "window of 32": lambda m: Mods(mask=lambda b, h, q, kv: (q >= kv) & (q - kv <= 31)),
    "causal, exclusive or": lambda m: Mods(mask=lambda b, h, q, kv: (q >= kv) ^ (kv == 20)),
    "causal, or one key": lambda m: Mods(mask=lambda b, h, q, kv: (q >= kv) | (kv == 20)),
    "mask in a mask": lambda m: Mods(
        score=lambda s, b, h, q, kv: torch.where(q >= kv, torch.where(q < kv + 5, s, -INF), -INF)
    ),
    "masked where not": lambda m: Mods(score=lambda s, b, h, q, kv: torch.where(q >= kv, -INF, s)),
    "causal in one head": lambda m: Mods(
        score=lambda s, b, h, q, kv: torch.where(h == 0, torch.where(q >= kv, s, -INF), s)
    ),
    "a head of nothing": lambda m: Mods(score=lambda s, b, h, q, kv: s + torch.where(h == 1, -INF, 0.0)),
    "a row of nothing": lambda m: Mods(score=lambda s, b, h, q, kv: s + torch.log(q.to(torch.float32))),
    "minus itself": lambda m: Mods(score=lambda s, b, h, q, kv: s - s),
    "minus nearly itself": lambda m: Mods(score=lambda s, b, h, q, kv: s - 0.999 * s),
    "times zero": lambda m: Mods(score=lambda s, b, h, q, kv: 0.0 * s + m.key_bias[b, kv]),
    "no score at all": lambda m: Mods(score=lambda s, b, h, q, kv: m.relative[h, q, kv]),
    "two minus score": lambda m: Mods(score=lambda s, b, h, q, kv: 2 - s),
    "score over two, doubled bias": lambda m: Mods(score=lambda s, b, h, q, kv: (s + (q - kv)) / 2),
    "cap, other size outside": lambda m: Mods(score=lambda s, b, h, q, kv: 19 * torch.tanh(s / 20)),
    "cap, negative": lambda m: Mods(score=lambda s, b, h, q, kv: -4 * torch.tanh(s / 3)),
    "cap, twice negative": lambda m: Mods(score=lambda s, b, h, q, kv: -4 * torch.tanh(-s / 3)),
    "cap over scaled heads": lambda m: Mods(score=lambda s, b, h, q, kv: 4 * torch.tanh(s * m.temperature[h])),
    "one key doubled": lambda m: Mods(score=lambda s, b, h, q, kv: torch.where(kv == 7, 2 * s, s)),
    "one query doubled": lambda m: Mods(score=lambda s, b, h, q, kv: torch.where(q == 7, 2 * s, s)),
    "quotient of factors": lambda m: Mods(score=lambda s, b, h, q, kv: s * (m.per_query[q] / m.per_key[kv])),
    "divided by a quotient": lambda m: Mods(score=lambda s, b, h, q, kv: s / (m.per_query[q] / m.per_key[kv])),
    "bias from behind": lambda m: Mods(score=lambda s, b, h, q, kv: s + m.per_key[kv - q]),
    "a table in a table": lambda m: Mods(score=lambda s, b, h, q, kv: s + m.buckets[h, m.document[kv]]),
    "a row, summed": lambda m: (
        Mods(score=lambda s, b, h, q, kv: s + (m.buckets[h] * m.relative[h, q, :32]).sum())
        if False
        else Mods(score=lambda s, b, h, q, kv: s + (m.buckets[h] * 0.1).sum() * (q - kv))
    ),
}


def program(define):
    model = Idiom(define).eval()
    given = tuple(torch.randn(2, HEADS, 9, SIZE) for _ in range(3))
    free = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    with fxfuse.flex_capture(), torch.no_grad():
        return model, torch.export.export(model, given, dynamic_shapes=(free,) * 3)


def wrong(model, fused):
    """The largest difference to eager, for scores from small to beyond every clamp, relative to their rounding."""
    worst = 0.0
    for batch, length in SHAPES:
        for size in (0.3, 2.0, 9.0):
            draw = torch.Generator().manual_seed(length)
            q, k, v = (torch.randn(batch, HEADS, length, SIZE, generator=draw) for _ in range(3))
            with torch.no_grad():
                expected, actual = model(q * size, k * size, v), fused.module()(q * size, k * size, v)
            away = (expected - actual).abs()
            away[expected.isnan() & actual.isnan()] = 0.0
            worst = max(worst, float(away.max()) / max(1.0, size * size))
    return worst


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def judged(define):
    """Fused with proof and without: the entries, and how wrong each is."""
    model, captured = program(define)
    for prove in ("on", "off"):
        fused = fxfuse.fuse(captured, prove=prove)
        (entry,) = [e for e in fxfuse.report(fused) if e.operator == "Attention"]
        yield entry, wrong(model, fused)


def sampled(cases, names):
    """A few by default, the others slow."""
    return [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in cases]


@pytest.mark.parametrize("case", sampled(NOT_ATTENTION, ("clamp far out", "mask by a large score", "finite fill")))
def test_is_written_out(case):
    """The reading itself says no, with proof or without: numbers only have a veto."""
    for entry, error in judged(NOT_ATTENTION[case]):
        assert entry.status == "decomposed" and entry.reason
        assert error < 1e-5


@pytest.mark.parametrize(
    "case", sampled(EDGES, ("q >= kv - 1", "not q > kv", "alpha", "window of 32", "a row, summed"))
)
def test_means_the_same(case):
    for entry, error in judged(EDGES[case]):
        assert entry.status in ("fused", "decomposed"), entry.reason
        assert error < 1e-5
