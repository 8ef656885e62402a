"""Each kind of hostile program, small: what is fused computes what the model does, at every size and magnitude; what
may not be fused says why; and the same program without its break is fused.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fxfuse
from tests.proof.kinds import INF, QKV, Model, attend, check, drawn, fuse, qkv, rows, sampled

LENGTHS = (1, 6, 70, 300)


def masked(mask, **buffers):
    """SDPA with this mask, or written out: both say the same."""

    def sdpa(q, k, v, **given):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(q.shape[2], *given.values()))

    def written(q, k, v, **given):
        keep = mask(q.shape[2], *given.values())
        return attend(q, k, v, lambda s: s.masked_fill(~keep, -INF))

    return [fuse(Model(f, buffers), qkv(), QKV) for f in (sdpa, written)]


def hole(size=400, first=60):
    table = torch.ones(size, size, dtype=torch.bool).tril()
    table[first:, 10] = False
    return table


def near(width):
    def mask(length):
        i, j = rows(length)
        return (j <= i) & (i - j < width)

    return mask


def between(condition):
    """Causal, and this of row, column and length."""

    def mask(length, *buffers):
        i, j = rows(length)
        return (j <= i) & condition(i, j, length, *buffers)

    return mask


# "At every size" read off literals: causal for as long as is looked, and then not.
LATER = {
    "a window": (near(100), {}),
    "chunks by shifts": (between(lambda i, j, S: (i >> 6) == (j >> 6)), {}),
    "chunks of chunks": (between(lambda i, j, S: i // 8 // 8 == j // 8 // 8), {}),
    "a decay in floats": (between(lambda i, j, S: torch.exp(-(i - j).clamp(min=0) / 20) > 1e-2), {}),
    "squares": (between(lambda i, j, S: (i - j) ** 2 < 100**2), {}),
    "a logarithm": (between(lambda i, j, S: torch.log1p((i - j).clamp(min=0).float()) < 4.5), {}),
    "the sum of a buffer": (between(lambda i, j, S, b: i - j < b.sum()), {"b": torch.ones(90)}),
    "a buffer for each head": (
        between(lambda i, j, S, b: (i - j < b[:, None, None])[None]),
        {"b": torch.tensor([500, 90])},
    ),
    "a buffer of windows": (between(lambda i, j, S, b: i - j < b[1]), {"b": torch.tensor([500, 90])}),
    "a share of the length": (lambda S: (rows(S)[1] <= rows(S)[0]) | (rows(S)[1] < S // 64), {}),
    "the larger of a size": (between(lambda i, j, S: i - j < torch.sym_max(64, S // 2)), {}),
    "positions in int8": (lambda S: rows(S)[1].to(torch.int8) <= rows(S)[0].to(torch.int8), {}),
    "positions doubled in uint8": (lambda S: rows(S)[1].to(torch.uint8) * 2 <= rows(S)[0].to(torch.uint8) * 2, {}),
    "positions shifted out of int32": (lambda S: (rows(S)[1].int() << 25) <= (rows(S)[0].int() << 25), {}),
    "positions in bfloat16": (lambda S: rows(S)[1].bfloat16() <= rows(S)[0].bfloat16(), {}),
    "positions beside bfloat16": (lambda S: rows(S)[1] <= rows(S)[0].bfloat16(), {}),
    "positions far out in float32": (lambda S: rows(S)[1].float() + 2.0**24 <= rows(S)[0].float() + 2.0**24, {}),
    "a hole in the tail of a table": (lambda S, t: t[:S, :S], {"t": hole()}),
    "a hole, reached by an index": (lambda S, t: t[(p := torch.arange(S).clamp(max=99))][:, p], {"t": hole(100)}),
    "what is compared with itself": (
        between(lambda i, j, S: (z := ((j - i) + 90).float().log()) == z),
        {},
    ),
}
ALWAYS = {
    "plain": (lambda S: rows(S)[1] <= rows(S)[0], {}),
    "shifted to the left": (lambda S: (rows(S)[1] << 1) <= (rows(S)[0] << 1) + 1, {}),
    "in float32": (lambda S: rows(S)[1].float() < rows(S)[0].float() + 1, {}),
    "a table": (lambda S, t: t[:S, :S], {"t": torch.ones(400, 400, dtype=torch.bool).tril()}),
    "triangle": (lambda S: torch.ones(S, S).tril() > 0, {}),
    "and what always holds": (between(lambda i, j, S: i - j < S), {}),
}


@pytest.mark.parametrize("case", sampled(LATER, "a window", "a decay", "a buffer for", "positions", "a hole in"))
def test_a_mask_that_is_causal_for_a_while_is_not_causal(case):
    for made in masked(LATER[case][0], **LATER[case][1]):
        assert not made.is_causal(), made.said
        assert made.done or made.entries[0].reason
        check(made, [qkv(n) for n in LENGTHS])


@pytest.mark.parametrize("case", ALWAYS)
def test_and_one_that_always_is_needs_no_mask(case):
    for made in masked(ALWAYS[case][0], **ALWAYS[case][1]):
        assert made.is_causal(), made.said
        check(made, [qkv(n) for n in LENGTHS[1:]])


def test_a_bound_of_the_program_is_used():
    """Up to a length of 64 a window of 64 is causal."""
    model = Model(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=near(64)(q.shape[2])), {})
    for most, causal in ((64, True), (65, False)):
        length = torch.export.Dim("S", min=1, max=most)
        program = torch.export.export(model, tuple(qkv()), dynamic_shapes=(({2: length},) * 3,), strict=False)
        fused = fxfuse.fuse(program)
        assert any(n.kwargs.get("is_causal") for n in fused.graph.nodes) == causal, fxfuse.report(fused)


# Factors of the scores, of the weights and of rows.
SCORES = {
    "a decay that begins far away": (lambda s, S: s * torch.where(rows(S)[0] - rows(S)[1] > 90, 0.5, 1.0), ""),
    "a temperature by blocks": (lambda s, S: s * (1 + 0.1 * (torch.arange(S) // 64))[:, None], ""),
    "a temperature by log": (
        lambda s, S: s * (torch.arange(1, S + 1).log() / math.log(64)).clamp(min=1.0)[:, None],
        "",
    ),
    "a temperature by length": (lambda s, S: s * (1 + S // 64), ""),
    "the larger of a length": (lambda s, S: s * torch.sym_max(1.0, S / 64), ""),
    "clamped": (lambda s, S: s.clamp(-40, 40), "clamp"),
    "clamped far out": (lambda s, S: s.clamp(max=3e4), "clamp"),
    "beyond a threshold": (lambda s, S: torch.where(s.abs() > 1e3, s / 2, s), ""),
    "a bias that saturates": (lambda s, S: (s + 0.1 * (rows(S)[1] - rows(S)[0])).clamp(min=-300), "differs"),
    "shrunk": (lambda s, S: torch.where(s.abs() < 1e-4, 0.0, s), ""),
    "filled with -1e3": (lambda s, S: s.masked_fill(rows(S)[1] > rows(S)[0], -1e3), "-1000"),
    "filled with -1e4": (lambda s, S: s.masked_fill(rows(S)[1] > rows(S)[0], -1e4), "-10000"),
    "at the largest k": (lambda s, S: s.masked_fill(s < s.topk(torch.sym_min(9, S), -1).values[..., -1:], -INF), ""),
}
WEIGHTS = {
    "gated by the largest score": lambda w, s: w * (1 - F.relu(s.amax(-1, keepdim=True) - 50) / 50).clamp(min=0),
    "dead rows": lambda w, s: w * (s.amax(-1, keepdim=True) > -30),
    "small ones dropped": lambda w, s: w * (w > 1e-6),
    "an epsilon in the sum": lambda w, s: w / (w.sum(-1, keepdim=True) + 1e-3),
}
SOFT = {
    "plain": lambda s, S: s,
    "capped": lambda s, S: 30 * torch.tanh(s / 30),
    "filled with -1e9": lambda s, S: s.masked_fill(rows(S)[1] > rows(S)[0], -1e9),
    "a bias": lambda s, S: s + 0.1 * (rows(S)[1] - rows(S)[0]),
    "clamped at the type's end": lambda s, S: s.clamp(min=torch.finfo(torch.float32).min),
}
CALLS = [*(qkv(n) for n in LENGTHS), *(qkv(9, 2, scale) for scale in (1e-3, 10.0, 30.0, 300.0))]
CALLS.append([CALLS[1][0].abs() * 12, -CALLS[1][1].abs() * 12, CALLS[1][2]])


@pytest.mark.parametrize("case", sampled(SCORES, "a decay", "clamped far", "filled with -1e4", "a temperature by l"))
def test_scores_that_are_changed_somewhere(case):
    change, named = SCORES[case]
    made = fuse(Model(lambda q, k, v: attend(q, k, v, lambda s: change(s, q.shape[2])), {}), qkv(), QKV)
    check(made, CALLS)
    if named:
        assert not made.done and named in made.said, made.said


@pytest.mark.parametrize("case", sampled(WEIGHTS, "gated", "an epsilon"))
def test_weights_that_are_changed_somewhere(case):
    def model(q, k, v):
        s = q @ k.transpose(-1, -2) * 0.5
        return WEIGHTS[case](s.softmax(-1), s) @ v

    made = fuse(Model(model, {}), qkv(), QKV)
    assert not made.done, made.said
    check(made, CALLS)


@pytest.mark.parametrize("case", SOFT)
def test_scores_that_an_attention_says(case):
    made = fuse(Model(lambda q, k, v: attend(q, k, v, lambda s: SOFT[case](s, q.shape[2])), {}), qkv(), QKV)
    assert made.done, made.said
    check(made, CALLS)


# Size arithmetic inside a region.
SIZED = {
    "v rolled by the length": lambda q, k, v: F.scaled_dot_product_attention(q, k, v.roll(v.shape[2] // 64, 2)),
    "the last 64 keys": lambda q, k, v: F.scaled_dot_product_attention(
        q, *(t.narrow(2, t.shape[2] - (n := torch.sym_min(t.shape[2], 64)), n) for t in (k, v))
    ),
    "keys in a ring": lambda q, k, v: F.scaled_dot_product_attention(
        q, *(t[:, :, torch.arange(t.shape[2]) % 64] for t in (k, v))
    ),
    "keys pooled far away": lambda q, k, v: F.scaled_dot_product_attention(
        q, *(t.index_select(2, (i := torch.arange(t.shape[2])) - (i // 64) % 2) for t in (k, v))
    ),
    "heads in another order when long": lambda q, k, v: F.scaled_dot_product_attention(
        q, k[:, (torch.arange(2) + k.shape[2] // 64) % 2], v
    ),
    "a factor of sizes": lambda q, k, v: attend(q, k, v) * (1 + q.shape[2] // 128),
}


@pytest.mark.parametrize("case", sampled(SIZED, "v rolled", "keys in", "a factor"))
def test_sizes_inside_a_region(case):
    made = fuse(Model(SIZED[case], {}), qkv(), QKV)
    check(made, [qkv(n) for n in LENGTHS])


def padded(length, batch=2, hidden=3):
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, : min(hidden, length)] = False
    return [*qkv(length, batch), mask]


FILLED = {
    "averaging": lambda s, m: s.masked_fill(~m, torch.finfo(s.dtype).min),
    "averaging by -1e9": lambda s, m: s.masked_fill(~m, -1e9),
    "not a number": lambda s, m: s.masked_fill(~m, -INF),
    "two depths": lambda s, m: s.masked_fill(~m, -1e9).masked_fill(torch.ones_like(m).triu(1), -1e30),
    "two depths, turned": lambda s, m: s.masked_fill(torch.ones_like(m).triu(1), -1e30).masked_fill(~m, -1e9),
    "filled, then added": lambda s, m: s.masked_fill(torch.ones_like(m).triu(1), -1e9) + (~m).float() * -1e9,
    "added, at the end of the type": lambda s, m: s + (~m).float() * torch.finfo(s.dtype).min,
    "added -1e4": lambda s, m: s + (~m).float() * -1e4,
    "less 1e4": lambda s, m: torch.where(m, s, s - 1e4),
}


@pytest.mark.parametrize("case", sampled(FILLED, "averaging", "two depths", "added -1e4"))
def test_rows_that_see_no_key(case):
    def model(q, k, v, m):
        keep = m[:, None, None].expand(-1, 1, q.shape[2], -1)
        return attend(q, k, v, lambda s: FILLED[case](s, keep))

    made = fuse(Model(model, {}), padded(6), (*QKV, (0, 1)))
    check(made, [padded(n, b, h) for n, b, h in ((6, 2, 3), (9, 3, 9), (5, 1, 0), (70, 2, 69))])


def test_rows_of_a_mask_that_is_given():
    """A float mask of the type's minimum throughout a row: PyTorch averages."""
    model = Model(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), {})
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(2, 1, 6, 6).masked_fill(drawn(2, 1, 6, 6) > 0.5, lowest)
    mask[0, 0, :2] = lowest
    made = fuse(model, [*qkv(6, 2), mask], (*QKV, (0, 2, 3)))
    assert made.done
    check(made, [[*qkv(6, 2), mask]])
