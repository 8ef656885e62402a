"""Attention computes what ONNX defines (opset 23 and 24), element by element, in its corners too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.attention_bounds import bounds
from tests.ops.onnx_definition import DRAWS, assert_within, defined, drawn, single

ops = torch.ops.fxfuse
F16, F32, F64 = torch.float16, torch.float32, torch.float64
INF = float("inf")
B, H, G, SQ, T, P, D, DV = 2, 4, 2, 3, 5, 2, 16, 6

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "many heads, values of another size": {"G": H, "DV": DV},
    "one key head": {"G": 1},
    "3-D": {"flat": True},
    "scale 1e-6": {"scale": 1e-6},
    "scale 1e3": {"scale": 1e3},
    "scale 0": {"scale": 0.0},
    "softcap 1e-3": {"softcap": 1e-3},
    "softcap 50": {"softcap": 50.0, "DV": DV, "flat": True},
    "softcap 1e6": {"softcap": 1e6, "is_causal": 1},
    "softmax in float32": {"softmax_precision": 1},
    "softmax in float64": {"softmax_precision": 11, "is_causal": 1},
    "causal, more keys": {"is_causal": 1},
    "causal, fewer keys": {"is_causal": 1, "T": 2},
    "causal, one query": {"is_causal": 1, "SQ": 1},
    "past": {"P": P},
    "past, causal": {"P": P, "is_causal": 1, "flat": True},
    "past, causal, one query": {"P": P, "is_causal": 1, "SQ": 1, "T": 1, "G": H},
    "empty past, causal": {"P": 0, "is_causal": 1, "T": 3},
    "lengths": {"lengths": (4, 2)},
    "lengths, causal": {"lengths": (4, 2), "is_causal": 1},
    "lengths below the queries, causal": {"lengths": (2, 0), "is_causal": 1, "flat": True},
    "lengths, all, causal, softcap": {"lengths": (5, 5), "is_causal": 1, "softcap": 3.0},
}
"""What is not one of the sizes, `flat` or `lengths` is an attribute."""

CASES = [(name, opset) for name, opset in itertools.product(VARIANTS, (23, 24)) if opset == 24 or "length" not in name]


def masks(dtype: torch.dtype, Sq: int, total: int, heads: int, opset: int) -> Iterator[tuple[str, Tensor | None]]:
    """Rows that see nothing, one key or some; the shapes that a mask can have."""
    random = torch.Generator().manual_seed(3)
    yield "none", None
    kept = torch.rand(B, heads, Sq, total, generator=random) < 0.6
    kept[0, :, 0] = False
    kept[1, :, -1] = False
    kept[1, :, -1, -1] = True
    kept[1, 0, 0] = False
    shapes = {"4-D": kept, "batch": kept[:, :1], "heads": kept[0], "2-D": kept[0, 0], "1 row": kept[:, :1, :1]}
    for name, shape in shapes.items():
        yield f"bool {name}", shape
    yield "nothing at all", torch.zeros(B, 1, Sq, total, dtype=torch.bool)
    if opset == 24 and total > 2:
        yield "bool short", kept[..., : total - 2]
        yield "bool one column", kept[..., -1:]
        yield "-inf short", torch.zeros(B, 1, Sq, total - 1, dtype=dtype)
    lowest = torch.finfo(dtype).min
    for fill in (-INF, -1e4, *((-1e9, lowest, lowest / 2) if dtype != F16 else ())):
        bias = torch.randn(B, heads, Sq, total, generator=random).to(dtype)
        yield f"float {fill:g}", bias.masked_fill(~kept, fill)
        yield f"float {fill:g}, batch", torch.zeros(B, 1, Sq, total, dtype=dtype).masked_fill(~kept[:, :1], fill)
    if dtype != F16:
        mixed = torch.zeros(B, 1, Sq, total, dtype=dtype).masked_fill(~kept[:, :1], lowest)
        mixed[..., total // 2 + 1 :] = -INF
        yield "float lowest in front, -inf behind", mixed


def call(
    variant: dict[str, Any], kind: float | str, dtype: torch.dtype
) -> tuple[list[Tensor | None], dict[str, Any], int]:
    """Arguments but for the mask, attributes, and how many heads there are."""
    v = {"G": G, "SQ": SQ, "T": T, "DV": D, "flat": False, "lengths": None, **variant}
    shapes = ((H, v["SQ"], D), (v["G"], v["T"], D), (v["G"], v["T"], v["DV"]))
    given: list[Tensor | None] = []
    for seed, (heads, length, size) in enumerate(shapes):
        x = drawn(1.0 if kind == "zeros" and seed == 2 else kind, B, heads, length, size, dtype=dtype, seed=seed)
        given.append(x.transpose(1, 2).flatten(2) if v["flat"] else x.transpose(1, 2).contiguous().transpose(1, 2))
    given.append(None)
    if "P" in v:
        given += [drawn(kind, B, v["G"], v["P"], size, dtype=dtype, seed=9) for size in (D, v["DV"])]
    else:
        given += [None, None]
    given += [] if v["lengths"] is None else [torch.tensor(v["lengths"])]
    attributes = {name: value for name, value in variant.items() if name.islower() and name not in ("flat", "lengths")}
    attributes |= {name: single(attributes[name]) for name in ("scale", "softcap") if name in attributes}
    if v["flat"]:
        attributes |= {"q_num_heads": H, "kv_num_heads": v["G"]}
    return given, attributes, H


def check(variant: str, kind: float | str, dtype: torch.dtype, opset: int) -> tuple[int, int]:
    """All masks of one variant; returns how many elements there were, and how many had a bound that says something."""
    given, attributes, heads = call(VARIANTS[variant], kind, dtype)
    sizes = {"SQ": SQ, "T": T, "P": 0, **VARIANTS[variant]}
    tight = count = 0
    for name, mask in masks(dtype, sizes["SQ"], sizes["T"] + sizes["P"], heads, opset):
        args = (*given[:3], mask, *given[4:])
        what = f"{variant}, {kind}, mask {name}"
        wanted = defined(ops.attention.default, args, attributes, opset)[0]
        bound = bounds(args, attributes).y
        assert_within(ops.attention(*args, **attributes), wanted, bound, what)
        assert not wanted.isnan().any(), what
        largest = max(float(x.double().abs().max()) for x in (given[2], *given[5:6]) if x is not None and x.numel())
        tight += int((bound <= 1e-3 * largest).sum())
        count += bound.numel()
    return count, tight


@pytest.mark.parametrize(("variant", "opset"), CASES, ids=str)
def test_float32(variant: str, opset: int) -> None:
    for kind in DRAWS if opset == 24 else (1e-3, 1.0, 1e6):
        count, tight = check(variant, kind, F32, opset)
        # Large scores are rounded by whole numbers: of two that are close together either may win.
        large = kind in (1e3, 1e6, "outlier")
        assert tight >= count * (0.8 if large else 1.0), f"{kind}: bounds of {tight} of {count} elements say something"


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "scale" not in name], ids=str)
def test_float64(variant: str) -> None:
    """Heads of 16: the root of their scale is exact, which the body computes in float32."""
    for kind in (1e-6, 1.0, "outlier", "zeros"):
        if "float32" not in variant:
            check(variant, kind, F64, 24)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_float16(variant: str) -> None:
    for kind in (1e-3, 1.0, "zeros"):
        if variant not in ("scale 1e3", "softcap 1e6"):  # the body's scores overflow
            check(variant, kind, F16, 24)


@pytest.mark.parametrize("opset", [23, 24])
def test_other_outputs(opset: int) -> None:
    """The keys and values so far, and the scores at their four stages."""
    for variant, kind in itertools.product(("softcap 50", "past, causal", "causal, more keys"), (1e-6, 1.0, 1e3)):
        given, attributes, heads = call(VARIANTS[variant], kind, F32)
        sizes = {"T": T, "P": 0, **VARIANTS[variant]}
        for (name, mask), mode in itertools.product(masks(F32, SQ, sizes["T"] + sizes["P"], heads, 23), range(4)):
            args, call_ = (*given[:3], mask, *given[4:]), {**attributes, "qk_matmul_output_mode": mode}
            wanted = defined(ops.attention_with_qk.default, args, call_, opset)
            actual = ops.attention_with_qk(*args, **call_)
            limits = bounds(args, attributes)
            zero = torch.zeros((), dtype=F64)
            stages = zip(actual, wanted, (limits.y, zero, zero, limits.qk[mode]), strict=True)
            for place, (ours, theirs, bound) in enumerate(stages):
                assert_within(ours, theirs, bound, f"{variant}, {kind}, {name}, mode {mode}, output {place}")
