"""Where Attention's definition was corrected, where it overflows, and where ours gives another answer: said one by one.

Corrected in onnx 1.23 (https://github.com/onnx/onnx/pull/8068), in the bodies of opset 23 and 24: a query that sees
no key gives 0; with `nonpad_kv_seqlen` causality counts from the last key.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.attention_bounds import bounds
from tests.ops.onnx_definition import assert_within, defined, drawn, ulp

ops = torch.ops.fxfuse
F16, F32, F64 = torch.float16, torch.float32, torch.float64
INF = float("inf")
B, H, G, SQ, T, D = 2, 4, 2, 3, 5, 16
opsets = pytest.mark.parametrize("opset", [23, 24])


def qkv(kind: float = 1.0, dtype: torch.dtype = F32, size: int = D) -> tuple[Tensor, Tensor, Tensor]:
    heads = ((H, SQ), (G, T), (G, T))
    q, k, v = (drawn(kind, B, h, s, size, dtype=dtype, seed=seed) for seed, (h, s) in enumerate(heads))
    return q, k, v


def both(*args: Tensor | None, opset: int = 24, **attributes: Any) -> tuple[Tensor, Tensor]:
    """What is defined, and ours."""
    return body(*args, opset=opset, **attributes), ops.attention(*args, **attributes)


def body(*args: Tensor | None, opset: int = 24, **attributes: Any) -> Tensor:
    return defined(ops.attention.default, args, attributes, opset)[0]


@opsets
def test_a_row_that_sees_no_key_is_zero(opset: int) -> None:
    q, k, v = qkv()
    boolean = torch.ones(SQ, T, dtype=torch.bool)
    boolean[1] = False
    for mask in (boolean, torch.zeros(SQ, T).masked_fill(~boolean, -INF)):
        for causal in (0, 1):
            for y in both(q, k, v, mask, opset=opset, is_causal=causal):
                assert (y[:, :, 1] == 0).all() and (y[:, :, [0, 2]] != 0).all()


@opsets
def test_a_row_of_the_lowest_number_averages(opset: int) -> None:
    """What hides is a number: the scores are lost against it. So in eager PyTorch; ONNX Runtime gives 0."""
    q, k, v = qkv()
    mask = torch.zeros(SQ, T)
    mask[1] = torch.finfo(F32).min
    mask[2, :3], mask[2, 3:] = torch.finfo(F32).min, -INF
    for y in both(q, k, v, mask, opset=opset):
        means = torch.stack((v.mean(2), v[:, :, :3].mean(2)), 2).repeat_interleave(H // G, 1)
        torch.testing.assert_close(y[:, :, 1:], means, rtol=1e-6, atol=1e-6)


def test_causality_counts_from_the_last_valid_key() -> None:
    """Query i sees key j up to i + nonpad_kv_seqlen - Sq: with fewer keys than queries the first see none."""
    q, k, v = qkv()
    for lengths in ((5, 3), (2, 0), (1, 4)):
        n = torch.tensor(lengths)
        last = torch.arange(SQ).unsqueeze(1) + n.view(-1, 1, 1, 1) - SQ
        seen = torch.arange(T) <= last
        expected = ops.attention(q, k, v, seen)
        for y in both(q, k, v, None, None, None, n, is_causal=1):
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
            assert torch.equal((y == 0).all(-1), ~seen.any(-1).expand(B, H, SQ))


@opsets
def test_causality_without_lengths(opset: int) -> None:
    """From the first key on, also where there are more keys or fewer; behind a past, from there."""
    q, k, v = qkv()
    for total in (T, 2):
        given = (q, k[:, :, :total], v[:, :, :total])
        seen = torch.ones(SQ, total, dtype=torch.bool).tril()
        for y in both(*given, opset=opset, is_causal=1):
            torch.testing.assert_close(y, ops.attention(*given, seen), rtol=1e-5, atol=1e-6)
    past = (k[:, :, :2], v[:, :, :2])
    seen = torch.ones(SQ, 5, dtype=torch.bool).tril(2)
    new = (q, k[:, :, 2:], v[:, :, 2:])
    for y in both(*new, None, *past, opset=opset, is_causal=1):
        torch.testing.assert_close(y, ops.attention(q, k, v, seen), rtol=1e-5, atol=1e-6)


def test_a_mask_of_one_column() -> None:
    """Opset 24 and ours: keys beyond a mask are hidden. The body of 23 broadcasts; fxfuse writes masks out whole."""
    q, k, v = qkv()
    mask = torch.ones(SQ, 1, dtype=torch.bool)
    first = v[:, :, :1].expand(-1, -1, SQ, -1).repeat_interleave(H // G, 1)
    torch.testing.assert_close(ops.attention(q, k, v, mask), first)
    torch.testing.assert_close(body(q, k, v, mask), first)
    torch.testing.assert_close(body(q, k, v, mask, opset=23), ops.attention(q, k, v))


@opsets
def test_a_negative_scale(opset: int) -> None:
    """The body takes its root: nan. Ours gives what the formula says."""
    q, k, v = qkv()
    assert body(q, k, v, opset=opset, scale=-0.25).isnan().all()
    torch.testing.assert_close(ops.attention(q, k, v, scale=-0.25), body(-q, k, v, scale=0.25), rtol=1e-5, atol=1e-6)


def test_scores_that_overflow_float16() -> None:
    """The body rounds them to float16: infinite ones give nan. Ours adds up in float32, and rounds the result."""
    q, k, v = qkv(300.0, F16)
    assert body(q, k, v, scale=1.0).isnan().any()
    ours = ops.attention(q, k, v, scale=1.0)
    wide = (q.float(), k.float(), v.float())
    bound = bounds(wide, {"scale": 1.0}).y + ulp(F16) * body(*wide, scale=1.0).double().abs()
    assert_within(ours.float(), body(*wide, scale=1.0), bound)
    # Under a soft-cap ours rounds them as the body does, and 30 · tanh(±inf) is ±30.
    capped = {"scale": 1.0, "softcap": 30.0}
    assert_within(*both(q, k, v, **capped), 4 * ulp(F16) * v.double().abs().amax())


def test_the_lowest_number_of_float16() -> None:
    """-65504 and a score may be -inf in float16, and the body's row nan. Ours adds in float32: finite, as there."""
    q, k, v = qkv(4.0, F16)
    q, k = -q.abs(), k.abs()
    mask = torch.zeros(SQ, T, dtype=F16)
    mask[1] = torch.finfo(F16).min
    assert body(q, k, v, mask).isnan().any()
    wide = tuple(x.float() for x in (q, k, v, mask))
    wanted = body(*wide)
    assert_within(ops.attention(q, k, v, mask).float(), wanted, bounds(wide, {}).y + ulp(F16) * wanted.double().abs())


def test_softmax_in_float16() -> None:
    q, k, v = qkv()
    mask = torch.rand(B, H, SQ, T, generator=torch.Generator().manual_seed(0)) < 0.5
    wanted = body(q, k, v, mask, softmax_precision=10)
    actual = ops.attention(q, k, v, mask, softmax_precision=10)
    assert_within(actual, wanted, bounds((q, k, v, mask), {"softmax_precision": 10}).y)
    assert (actual - ops.attention(q, k, v, mask)).abs().max() > 1e-5, "it is float16's"


def test_a_scale_that_float32_rounds() -> None:
    """The body works it out in float32, whatever the type; ours in Python's numbers. Only float64 shows it."""
    q, k, v = qkv(1.0, F64, size=10)
    off = (ops.attention(q, k, v) - body(q, k, v)).abs().max()
    assert 1e-10 < off < 1e-6
    exact = torch.softmax(q @ k.repeat_interleave(2, 1).mT / math.sqrt(10), -1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(ops.attention(q, k, v), exact, rtol=1e-14, atol=1e-14)
