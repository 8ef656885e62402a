"""Positions in narrow types: what wraps is read as wrapped, and of what is rounded nothing is said."""

from __future__ import annotations

import pytest
import torch
from torch import bfloat16, float16, int8, int16, int32, int64, uint8

from tests.proof.reading import check

I = torch.arange  # noqa: E741
NARROW = (int8, uint8, int16)
ARITHMETIC = {
    "sum": lambda x: x + x,
    "sum with a number": lambda x: x + 100,
    "less a number": lambda x: x - 10,
    "product": lambda x: x * x,
    "product with a number": lambda x: x * 3,
    "turned": lambda x: -x,
    "distance": lambda x: (x - 60).abs(),
    "compared": lambda x: x[:, None] >= x,
    "quotient": lambda x: x // 3,
    "remainder": lambda x: x % 7,
    "differences": lambda x: x[1:] - x[:-1],
    "compared with a number": lambda x: x < 100,
    "chosen": lambda x: torch.where(x > 3, x, 100),
    "twice wrapped": lambda x: (x + 100).to(torch.int8) + 100,
    "of low bits": lambda x: x & 15,
}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("how", ARITHMETIC)
def test_narrow_integers_wrap(how: str, dtype: torch.dtype) -> None:
    """130 in int8 is -126, wherever it was computed."""
    assert check(lambda S: ARITHMETIC[how](I(S).to(dtype))) == ["read"]


def test_a_number_among_narrow_integers_wraps_too() -> None:
    """Of uint8 nothing is at least -1, for that is 255."""
    assert check(lambda S: [I(S).to(uint8) >= -1, I(S).to(int8) < 200]) == ["read", "read"]


def test_counting_in_a_narrow_type() -> None:
    cases = check(lambda S: [torch.ones(S).cumsum(0, dtype=int8), I(S, dtype=uint8), torch.full((S,), S, dtype=int8)])
    assert cases == ["read"] * 3


@pytest.mark.parametrize("dtype", [int32, int64])
def test_wide_integers_overflow_only_where_positions_get_there(dtype: torch.dtype) -> None:
    """A shift to the left and back again looks like nothing at all."""
    bits = torch.iinfo(dtype).bits - 7
    far = check(lambda S: [(I(S).to(dtype) << bits) >> bits, (I(S).to(dtype) * 2**bits) // 2**bits])
    assert "read" not in far
    assert check(lambda S: (I(S).to(dtype) << 8) >> 8) == ["read"]


ROUNDED = {
    "counted in bfloat16": lambda S: I(S, dtype=bfloat16),
    "cast": lambda S: I(S).to(bfloat16),
    "times ones in bfloat16": lambda S: I(S) * torch.ones(S, dtype=bfloat16),
    "over ones in bfloat16": lambda S: I(S) / torch.ones(S, dtype=bfloat16),
    "times a triangle in bfloat16": lambda S: I(S) * torch.ones(S, S, dtype=bfloat16).tril(),
    "chosen beside bfloat16": lambda S: torch.where(I(S) > 3, I(S), torch.zeros(S, dtype=bfloat16)),
    "joined to bfloat16": lambda S: torch.cat([I(S), torch.zeros(2, dtype=bfloat16)]),
    "stacked with bfloat16": lambda S: torch.stack([I(S), torch.zeros(S, dtype=bfloat16)]),
    "compared with bfloat16": lambda S: I(S)[:, None] > (I(S) % 257).to(bfloat16),
    "the larger of it and bfloat16": lambda S: torch.maximum(I(S), torch.zeros(S, dtype=bfloat16)),
    "bounded by bfloat16": lambda S: I(S).clamp(max=torch.full((S,), 1000, dtype=bfloat16)),
    "the remainder in bfloat16": lambda S: I(S) % torch.full((S,), 7, dtype=bfloat16),
    "the quotient in bfloat16": lambda S: I(S) // torch.full((S,), 7, dtype=bfloat16),
    "a small product in bfloat16": lambda S: (I(S) % 200).to(bfloat16) * 3,
    "counted by adding in bfloat16": lambda S: torch.ones(S, dtype=bfloat16).cumsum(0),
    "the length in bfloat16": lambda S: torch.full((S,), S, dtype=bfloat16),
    "a large product in float16": lambda S: I(S).to(float16) * 1000,
    "beyond float16": lambda S: (I(S) % 100).to(float16) * 16 * 16 * 16,
    "far out in float32 and back": lambda S: (I(S).float() + 2.0**24) - 2.0**24,
    "compared far out in float32": lambda S: (I(S).float() + 2.0**24) <= (I(S)[:, None].float() + 2.0**24),
    "a chain of products in float32": lambda S: (I(S).float() * 15 * 15 * 15 * 15 * 15) % 16,
    "a cast of what is too large": lambda S: torch.full((S,), 300.5).to(int8),
}


@pytest.mark.parametrize("case", ROUNDED)
def test_what_may_be_rounded_is_not_read(case: str) -> None:
    assert "read" not in check(ROUNDED[case])


HELD = {
    "few in bfloat16": lambda S: (I(S) % 128).to(bfloat16),
    "compared in bfloat16": lambda S: (I(S) % 128).to(bfloat16) >= 100,
    "many in float16": lambda S: (I(S) % 2000).to(float16) < 1999,
    "in float32": lambda S: [I(S).float() + 1, I(S).float() * 8 - 3, I(S).float() // 3, I(S).float() % 3],
    "in int16": lambda S: I(S).to(int16).to(int64),
}


@pytest.mark.parametrize("case", HELD)
def test_what_the_type_holds_is_read(case: str) -> None:
    assert set(check(HELD[case])) == {"read"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, bfloat16])
def test_a_number_is_compared_as_the_type_has_it(dtype: torch.dtype) -> None:
    """0.1 is not float32's 0.1: a tensor of 0.1 is at most 0.1."""

    def tenths(length):
        x = torch.full((length,), 0.1, dtype=dtype)
        return [
            x <= 0.1,
            x == 0.1,
            x > 0.1,
            x < torch.tensor(0.1, dtype=torch.float64),
            x == torch.full((length,), 0.1),
        ]

    assert check(tenths) == ["read"] * 5


def test_truths_are_one_and_nothing() -> None:
    def truths(length):
        a, b = I(length) > 3, I(length) > 5
        return [
            a * b,
            a + 1,
            1 - a.float(),
            a ^ b,
            a | b,
            a.long() - b.long(),
            a >= b,
            torch.full((length,), length, dtype=torch.bool),
        ]

    assert check(truths) == ["read"] * 8
