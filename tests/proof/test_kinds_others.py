"""The kinds beside attention and norms: rotations, buffers, integers, what is remembered, a user's patterns, caches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fxfuse
from fxfuse.recognise.catalogue import unregister
from tests.proof.kinds import INF, QKV, Model, X, attend, check, drawn, fuse, qkv, rows, turned


def angles(rows=400, size=8, base=100.0):
    return torch.arange(rows)[:, None] * base ** (-torch.arange(size // 2) / (size // 2))


def table(change=lambda half: half, size=8):
    """cos of both halves; the second may be changed."""
    first = angles(size=size).cos()
    return torch.cat([first, change(first.clone())], -1)


def changed_from(row):
    def change(half):
        half[row:] *= 1.01
        return half

    return change


def sines(size=8):
    return torch.cat([angles(size=size).sin()] * 2, -1)


def by_table(x, cos, sin):
    return turned(x, cos[: x.shape[2]], sin[: x.shape[2]])


def ntk(x):
    """Dynamic NTK: the base grows with the length."""
    base = 100.0 * torch.sym_max(1, x.shape[2] // 64)
    angle = torch.arange(x.shape[2])[:, None] / base ** (torch.arange(4) / 4)
    both = torch.cat([angle, angle], -1)
    return turned(x, both.cos(), both.sin())


def xpos(x):
    position = torch.arange(x.shape[2])[:, None]
    both = torch.cat([position * torch.tensor([1.0, 0.5, 0.2, 0.1])] * 2, -1)
    return turned(x, both.cos() * 0.99**position, both.sin() * 0.99**position)


def scaled_later(x):
    """The halves are computed apart; from position 64 on in another way."""
    position = torch.arange(x.shape[2])[:, None].float()
    first = position * torch.tensor([1.0, 0.5, 0.2, 0.1])
    second = torch.where(position < 64, first, first / 2)
    both = torch.cat([first, second], -1)
    return turned(x, both.cos(), both.sin())


def signed(x, sign):
    """Signs from a table of positions, all equal below 64."""
    a, b = x.chunk(2, -1)
    both = torch.cat([angles()[: x.shape[2]]] * 2, -1)
    return x * both.cos() + torch.cat([-b, a * sign[: x.shape[2], None]], -1) * both.sin()


ROTATED = {
    "halves alike": (by_table, {"cos": table(), "sin": sines()}, True),
    "halves alike near the start": (by_table, {"cos": table(changed_from(64)), "sin": sines()}, False),
    "halves computed alike near the start": (scaled_later, {}, False),
    "a table of signs": (signed, {"sign": torch.where(torch.arange(400) < 64, 1.0, -1.0)}, False),
    "dynamic NTK": (ntk, {}, None),
    "xPos": (xpos, {}, True),
}
HEADS = [drawn(1, 2, n, 8) for n in (1, 6, 70, 300)]


@pytest.mark.parametrize("case", ROTATED)
def test_rotations(case):
    function, buffers, fused = ROTATED[case]
    made = fuse(Model(function, buffers), [HEADS[1]], ((0, 2),))
    check(made, [[x] for x in HEADS])
    assert fused is None or bool(made.done) == fused, made.said


def test_two_rotations_of_unlike_heads():
    """The halves of the longer one are alike in the columns that the shorter one has."""

    def model(x, y, **t):
        return by_table(x, t["c8"], t["s8"]), by_table(y, t["c32"], t["s32"])

    def change(half):
        half[50:, 5] *= 1.5
        return half

    buffers = {"c8": table(), "s8": sines(), "c32": table(change, 32), "s32": sines(32)}
    made = fuse(Model(model, buffers), [HEADS[1], drawn(1, 2, 6, 32)], ((0, 2), (0, 2)))
    assert len(made.done) == 1
    check(made, [[HEADS[2], drawn(1, 2, 70, 32)]])


def test_two_rotations_of_unlike_indices():
    """The same calls, and another order in a buffer: what was proven of one is not said of the other."""

    def model(x, one, two, cos, sin):
        def turn(t, order):
            return t * cos[: t.shape[2]] + t[..., order] * sin[: t.shape[2]]

        return turn(x, one), turn(x + 1, two)

    signed_sines = sines() * torch.tensor([-1.0] * 4 + [1.0] * 4)
    buffers = {"one": torch.tensor([4, 5, 6, 7, 0, 1, 2, 3]), "two": torch.tensor([5, 4, 6, 7, 0, 1, 2, 3])}
    made = fuse(Model(model, buffers | {"cos": table(), "sin": signed_sines}), [HEADS[1]], ((0, 2),))
    assert len(made.done) <= 1
    check(made, [[x] for x in HEADS])


@pytest.mark.parametrize("which", ["mask", "scale", "cos"])
def test_buffers_may_be_loaded_later(which):
    """Nothing is concluded from what a persistent buffer holds, unless it is frozen."""

    def model(q, k, v, mask, scale, cos, sin):
        q = by_table(q, cos, sin)
        keep = mask[: q.shape[2], : q.shape[2]]
        return attend(q, k, v, lambda s: (s * scale).masked_fill(~keep, -INF))

    lower = torch.ones(400, 400, dtype=torch.bool).tril()
    cos = torch.cat([angles(size=4).cos()] * 2, -1)
    buffers = {"mask": lower, "scale": torch.tensor(0.5), "cos": cos, "sin": torch.cat([angles(size=4).sin()] * 2, -1)}
    made = fuse(Model(model, buffers, persistent=True), qkv(), QKV)
    changed = {"mask": ~lower | lower.triu(), "scale": torch.tensor(2.0), "cos": table(changed_from(0), 4)}[which]
    for program in (made.program, made.fused):
        program.state_dict[which] = changed.clone()
    check(made, [qkv(n) for n in (6, 70)])
    assert not made.is_causal()


def test_frozen_buffers_are_met_whole():
    """A triangle that is frozen is causal."""

    def model(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[: q.shape[2], : q.shape[2]])

    for frozen in (True, False):
        lower = torch.ones(400, 400, dtype=torch.bool).tril()
        made = fuse(Model(model, {"mask": lower}, persistent=True), qkv(), QKV, frozen=frozen)
        assert made.is_causal() == frozen


@pytest.fixture
def patterns():
    made = []

    def example(function, **options):
        made.append(function.__name__)
        return fxfuse.pattern(replacement=function, ulp=8.0, **options)(function)

    yield example
    for name in made:
        unregister(name)


PACKED = {
    "low bits": (lambda p, s: (p & 15) * s, True),
    "fewer low bits": (lambda p, s: (p & 7) * s, False),
    "a table that is too short": (lambda p, s: (p & 15).clamp(max=11) * s, False),
    "high bits too": (lambda p, s: ((p & 15) + ((p >> 7) & 1)) * s, False),
}


@pytest.mark.parametrize("case", PACKED)
def test_packed_integers_are_drawn_over_their_whole_range(case, patterns):
    def unpacked(p, s):
        return (p & 15) * s

    function, fused = PACKED[case]
    made = fuse(
        Model(function, {}), [torch.arange(128, dtype=torch.int8), drawn(128)], ((), ()), patterns=[patterns(unpacked)]
    )
    assert bool(made.done) == fused, made.said
    check(made, [[torch.arange(-128, 128, 2).to(torch.int8), drawn(128)]])


EXAMPLES = {
    "the same": (lambda g, u: F.silu(g) * u, True),
    "spelled out": (lambda g, u: u * g * torch.sigmoid(g), True),
    "clamped": (lambda g, u: F.silu(g).clamp(max=50) * u, False),
    "a gate that is clamped": (lambda g, u: g * torch.sigmoid(g.clamp(-20, 20)) * u, False),
    "another function": (lambda g, u: F.gelu(g) * u, False),
}


@pytest.mark.parametrize("case", EXAMPLES)
def test_patterns_by_example(case, patterns):
    def swiglu(g, u):
        return F.silu(g) * u

    function, fused = EXAMPLES[case]
    made = fuse(Model(function, {}), [X[1], X[1] + 1], ((0, 1),) * 2, patterns=[patterns(swiglu)])
    check(made, [[x, x.flip(-1)] for x in X])
    assert bool(made.done) == fused or not made.done, made.said


def test_a_default_is_not_taken_for_the_region_s_number(patterns):
    def unit(x, eps=1e-12):
        return x / (x.square().sum(-1, keepdim=True) + eps).sqrt()

    made = fuse(Model(lambda x: unit(x, 1e-6), {}), [X[1]], ((0, 1),), patterns=[patterns(unit)])
    check(made, [[x] for x in X])


SLOTS = {
    "counted": (lambda start, i: start + i, True),
    "in int8": (lambda start, i: (start + i).to(torch.int8).long(), False),
    "in bfloat16": (lambda start, i: (start + i).to(torch.bfloat16).long(), False),
    "in a ring of 64": (lambda start, i: (start + i) % 64, None),
}


@pytest.mark.parametrize("case", SLOTS)
def test_slots_of_a_cache(case):
    slots, fused = SLOTS[case]

    def model(past, new, start):
        return past.index_copy(2, slots(start, torch.arange(new.shape[2])), new)

    past, new = drawn(1, 2, 400, 4), drawn(1, 2, 3, 4)
    made = fuse(Model(model, {}), [past, new, torch.tensor(2)], ((0,), (0, 2), ()))
    assert fused is None or bool(made.done) == fused, made.said
    check(made, [[past, drawn(1, 2, n, 4), torch.tensor(p)] for n, p in ((3, 0), (5, 61), (4, 120), (7, 250))])


def bottom_right(q, k, v):
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def tiled(q, k, v):
    return F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), is_causal=True)


WELL = {
    "bottom-right causal": (bottom_right, [qkv(3, keys=9), qkv(6), qkv(1, keys=7)]),
    "tiled heads": (tiled, [[drawn(1, 4, n, 4), *qkv(n)[1:]] for n in (6, 9)]),
    "batch, heads and length alike": (lambda q, k, v: attend(q, k, v, lambda s: s + rows(2)[1]), [qkv(2, 2)]),
    "an empty batch": (attend, [qkv(6), qkv(6, 0), qkv(1, 0)]),
    "longrope": (lambda q, k, v: attend(q * (1 + 0.1 * (q.shape[2] > 64)), k, v), [qkv(6), qkv(70)]),
}


@pytest.mark.parametrize("case", WELL)
def test_handled_well(case):
    function, calls = WELL[case]
    axes = ((),) * 3 if case.startswith("batch") else QKV
    made = fuse(Model(function, {}), calls[0], axes)
    check(made, calls)


def test_writes_between_two_masks():
    """One mask before a write and one after are two."""

    def model(q, k, v):
        mask = torch.full((q.shape[2], q.shape[2]), -INF).triu(1)
        first = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mask[:, 0] = 0
        mask[0] = 0
        return first, F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    made = fuse(Model(model, {}), qkv(), QKV)
    check(made, [qkv(n) for n in (1, 6, 9)])


def test_a_break_beside_the_region_does_not_matter():
    """OLMo's clip_qkv lies before the region, which is fused all the same."""
    made = fuse(Model(lambda q, k, v: attend(*(t.clamp(-8, 8) for t in (q, k, v))), {}), qkv(), QKV)
    assert made.done
    check(made, [qkv(6), qkv(6, scale=30.0)])
