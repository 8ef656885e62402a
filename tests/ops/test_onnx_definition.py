"""RMSNormalization, RotaryEmbedding and TensorScatter compute what ONNX defines, element by element."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.onnx_definition import DRAWS, assert_within, defined, drawn, single, smallest, ulp

ops = torch.ops.fxfuse
opsets = pytest.mark.parametrize("opset", [23, 24])
draws = pytest.mark.parametrize("kind", DRAWS, ids=str)
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
NUMBERS = {F32: 1, F16: 10, F64: 11, BF16: 16}


def check_norm(X: Tensor, scale: Tensor, opset: int, roundings: int = 8, **attributes: Any) -> None:
    """A few ulp of each element: of the stash type for the quotient, of the output's for what follows."""
    args = (X, scale)
    wanted = defined(ops.rms_norm.default, args, attributes, opset)[0]
    stash = next(dtype for dtype, n in NUMBERS.items() if n == attributes.get("stash_type", 1))
    eps = max(ulp(stash), ulp(X.dtype))
    # A quotient below the type's normal numbers is rounded to its grid, and only then multiplied.
    bound = roundings * eps * wanted.double().abs() + 2 * smallest(X.dtype) * scale.double().abs()
    ours = ops.rms_norm(X, scale, **{**attributes, "epsilon": single(attributes.get("epsilon", 1e-5))})
    assert_within(ours, wanted, bound + smallest(scale.dtype))
    if ulp(X.dtype) > ulp(stash):
        # The quotient is rounded to X's type before the product: almost always to the same number.
        assert (ours == wanted).double().mean() > 0.95


def test_attributes_are_numbers_of_float32() -> None:
    """In ONNX; ours keep what Python has, which only a stash of float64 shows, and which ONNX's file will not hold."""
    X, scale = drawn(1e-3, 2, 16, dtype=F64, seed=1), torch.ones(16, dtype=F64)
    wanted = defined(ops.rms_norm.default, (X, scale), {"stash_type": 11}, 24)[0]
    assert_within(ops.rms_norm(X, scale, epsilon=single(1e-5), stash_type=11), wanted, 8 * ulp(F64) * wanted.abs())
    ours = ops.rms_norm(X, scale, stash_type=11)
    assert (ours - wanted).abs().max() > 1e-10
    assert_within(ours, wanted, ulp(F32) * wanted.abs())


@opsets
@draws
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
def test_rms_norm(kind: float | str, dtype: torch.dtype, opset: int) -> None:
    for shape, axis in (((2, 3, 16), -1), ((2, 3, 16), 1), ((4, 5), 0), ((2, 1, 3, 33), 3)):
        for epsilon in (1e-5, 1e-6, 1e-2):
            X = drawn(kind, *shape, dtype=dtype, seed=1)
            X[:1] *= 0.5
            check_norm(X, drawn(1.0, *shape[axis:], dtype=dtype, seed=2), opset, axis=axis, epsilon=epsilon)


@opsets
@draws
def test_rms_norm_in_other_types(kind: float | str, opset: int) -> None:
    """`stash_type`: wider than X, or narrower."""
    for dtype, stash in ((F32, F64), (F16, F64), (BF16, F64), (F64, F64), (F32, BF16)):
        X, scale = drawn(kind, 2, 3, 16, dtype=dtype, seed=1), drawn(1.0, 16, dtype=dtype, seed=2)
        check_norm(X, scale, opset, stash_type=NUMBERS[stash])


def test_rms_norm_whose_squares_overflow() -> None:
    """In float16 the body's squares overflow above 255, and all is 0; ours sums in float32, and stays right."""
    X, scale = drawn(1e3, 2, 16, dtype=F16, seed=1), torch.ones(16, dtype=F16)
    attributes = {"stash_type": NUMBERS[F16]}
    assert (defined(ops.rms_norm.default, (X, scale), attributes, 24)[0] == 0).all()
    right = defined(ops.rms_norm.default, (X, scale), {}, 24)[0]
    assert_within(ops.rms_norm(X, scale, **attributes), right, 8 * ulp(F16) * right.double().abs())
    # In float32 both overflow, and give 0.
    X, scale = drawn(1e25, 2, 16, dtype=F32, seed=1), torch.ones(16)
    assert (defined(ops.rms_norm.default, (X, scale), {}, 24)[0] == 0).all()
    assert (ops.rms_norm(X, scale) == 0).all()


def test_rms_norm_of_nothing() -> None:
    """Without an epsilon a row of zeros is nan in both; with one it is 0."""
    X, scale = torch.zeros(2, 16), torch.ones(16)
    X[1] = 1.0
    check_norm(X, scale, 24)
    check_norm(X, scale, 24, epsilon=0.0)
    assert ops.rms_norm(X, scale, epsilon=0.0)[0].isnan().all()


ROTARY = {
    "4-D": {},
    "interleaved": {"interleaved": 1},
    "partial": {"rotary_embedding_dim": 4},
    "partial interleaved": {"rotary_embedding_dim": 4, "interleaved": 1},
}


@opsets
@draws
@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64], ids=str)
def test_rotary_embedding(kind: float | str, dtype: torch.dtype, opset: int) -> None:
    """To the last bit: the same products, rounded before the sum. (Float64 is not ONNX's, the same body is run.)"""
    B, H, S, D = 2, 3, 4, 8
    ids = torch.tensor([[6, 0, 1, 2], [3, 3, 5, 4]])
    for name, attributes in ROTARY.items():
        R = attributes.get("rotary_embedding_dim", D)
        for flat in (False, True):
            X = drawn(kind, *((B, S, H * D) if flat else (B, H, S, D)), dtype=dtype, seed=1)
            heads = {"num_heads": H} if flat else {}
            for where in (None, ids):
                # Angles' cosines and sines, and tables that are no angles'.
                for size in (1.0, kind):
                    lengths = (B, S) if where is None else (7,)
                    cos, sin = (drawn(size, *lengths, R // 2, dtype=dtype, seed=s) for s in (2, 3))
                    args = (X, cos, sin) if where is None else (X, cos, sin, where)
                    as_type = F32 if dtype == F64 else None
                    call = {**attributes, **heads}
                    (wanted,) = defined(ops.rotary_embedding.default, args, call, opset, as_type)
                    actual = ops.rotary_embedding(*args, **call)
                    assert_within(actual, wanted, torch.zeros((), dtype=F64), f"{name}, flat={flat}")


@draws
@pytest.mark.parametrize("dtype", [F32, F16, F64], ids=str)
def test_tensor_scatter(kind: float | str, dtype: torch.dtype) -> None:
    """To the last bit, in onnx's reference implementation: the standard has no body."""
    B, T = 2, 7
    for S in (1, 3, 7):
        last = T - S
        starts: list[tuple[str, list[int] | None]] = [("linear", None), ("linear", [0, 0]), ("linear", [last, 0])]
        starts += [("circular", None), ("circular", [0, T - 1]), ("circular", [T, T - 2]), ("circular", [3 * T - 1, 5])]
        for axis, shape in ((-2, (B, 2, T, 4)), (1, (B, T, 4)), (-1, (B, 4, T)), (2, (B, 2, T))):
            cache = drawn(kind, *shape, dtype=dtype, seed=1)
            size = [*shape]
            size[axis] = S
            update = drawn(kind, *size, dtype=dtype, seed=2) + 1
            for mode, start in starts:
                args = (cache, update) if start is None else (cache, update, torch.tensor(start))
                attributes = {"axis": axis, "mode": mode}
                (wanted,) = defined(ops.tensor_scatter.default, args, attributes, 24)
                actual = ops.tensor_scatter(*args, **attributes)
                assert_within(actual, wanted, torch.zeros((), dtype=F64), f"{mode} at {start}, axis {axis}")
