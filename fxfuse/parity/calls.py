"""The operators' matrices: which shapes, layouts and options each is compared over.

Sizes are 1, odd, powers of two, one more than a block, and long enough for several blocks of the kernels.
"""

from __future__ import annotations

from typing import Any

import torch

from fxfuse.parity.matrix import Call, Draw, labels, matrix

LAYOUTS = ("contiguous", "transposed", "strided", "sliced", "offset")
HEADS_LAST = ("3d", "3d sliced", "4d strided", "4d transposed")


@matrix(
    "rms_norm",
    layout=LAYOUTS,
    shape=((1, 1, 1), (2, 3, 7), (3, 5, 64), (1, 2, 129), (5, 83, 96), (2, 2, 4097)),
    option=("plain", "epsilon", "half stash", "double stash", "wide scale", "two axes", "scalar", "scale by row"),
)
def rms_norm(dtype: torch.dtype, layout: str, shape: tuple[int, ...], option: str, draw: Draw) -> Call | None:
    X = draw.laid_out(layout, *shape)
    kwargs: dict[str, Any] = {}
    scale_shape: tuple[int, ...] = shape[-1:]
    scale_dtype = None
    if option == "epsilon":
        X, kwargs = X * 1e-2, {"epsilon": 1e-3}
    elif option == "half stash":
        if dtype == torch.float32:
            return None  # a type that the model does not round to is no unit for its errors
        kwargs = {"stash_type": {torch.float16: 10, torch.bfloat16: 16}[dtype]}
    elif option == "double stash":
        kwargs = {"stash_type": 11}
    elif option == "wide scale":
        scale_dtype = torch.float32
    elif option == "two axes":
        kwargs, scale_shape = {"axis": -2}, shape[-2:]
    elif option == "scalar":
        scale_shape = ()
    elif option == "scale by row":
        scale_shape = (shape[1], 1)
    scale = draw.normal(*scale_shape, dtype=scale_dtype)
    point = labels(dtype=dtype, layout=layout, shape=shape, option=option)
    return Call("rms_norm", point, (X, scale), kwargs, dtype)


@matrix(
    "rotary_embedding",
    layout=HEADS_LAST,
    shape=((1, 1, 1, 2), (2, 3, 5, 8), (1, 7, 4, 80), (2, 129, 3, 64), (1, 2, 33, 128)),
    option=("halves", "interleaved", "partial", "partial interleaved"),
    angles=("ready", "expanded", "positions"),
)
def rotary_embedding(
    dtype: torch.dtype, layout: str, shape: tuple[int, ...], option: str, angles: str, draw: Draw
) -> Call | None:
    B, S, H, D = shape
    X, kwargs = _heads(draw, layout, B, H, S, D), {}
    if layout.startswith("3d"):
        kwargs["num_heads"] = H
    rotated = D
    if option.startswith("partial"):
        rotated = D // 2 // 2 * 2
        if rotated == 0:
            return None
        kwargs["rotary_embedding_dim"] = rotated
    if option.endswith("interleaved"):
        kwargs["interleaved"] = 1
    rows = (S + 5,) if angles == "positions" else (1 if angles == "expanded" else B, S)
    turn = torch.rand((*rows, rotated // 2), generator=draw.generator) * 6.3
    args = [X, turn.cos().to(dtype), turn.sin().to(dtype)]
    if angles == "expanded":
        args[1:] = [cache.expand(B, -1, -1) for cache in args[1:]]
    elif angles == "positions":
        args.append(draw.whole(0, S + 4, B, S))
    point = labels(dtype=dtype, layout=layout, shape=shape, option=option, angles=angles)
    return Call("rotary_embedding", point, tuple(args), kwargs, dtype)


ATTENTION_SHAPES = (
    (1, 1, 1, 1, 1, 1, 1),  # B, Hq, Hkv, Sq, Skv, D, Dv
    (2, 4, 2, 3, 5, 8, 8),
    (2, 3, 3, 7, 7, 16, 16),
    (1, 6, 2, 5, 70, 40, 24),
    (1, 8, 2, 1, 67, 64, 64),
    (1, 2, 1, 65, 129, 32, 32),
)
ATTENTION_OPTIONS = (
    "plain", "causal", "scale", "bool mask", "bool mask causal", "head bias", "bias causal", "short mask", "softcap",
    "softcap bias causal", "past", "past causal", "past bias", "past softcap", "lengths", "lengths causal",
    "lengths mask softcap", "negative mask",
)  # fmt: skip


@matrix("attention", layout=HEADS_LAST, shape=ATTENTION_SHAPES, option=ATTENTION_OPTIONS)
def attention(dtype: torch.dtype, layout: str, shape: tuple[int, ...], option: str, draw: Draw) -> Call | None:
    B, Hq, Hkv, Sq, Skv, D, Dv = shape
    words = option.split()
    Q = _heads(draw, layout, B, Hq, Sq, D)
    K, V = (_heads(draw, layout, B, Hkv, Skv, size) for size in (D, Dv))
    kwargs: dict[str, Any] = {"q_num_heads": Hq, "kv_num_heads": Hkv} if layout.startswith("3d") else {}
    P = 19 if "past" in words else 0
    past = [draw.normal(B, Hkv, P, size) for size in (D, Dv)] if P else [None, None]
    lengths = draw.whole(0, Skv, B) if "lengths" in words else None
    T, mask = P + Skv, None
    if option.startswith("bool"):
        mask = draw.bools(B, 1, Sq, T)
    elif option == "head bias":
        mask = draw.normal(Hq, Sq, T)
    elif option == "short mask":
        mask = draw.bools(Sq, max(T - 2, 1))
    elif option == "negative mask":  # what models add in place of -inf
        seen = draw.bools(B, 1, Sq, T)
        if dtype == torch.float16:
            seen[..., 0] = True  # beside -65504 the scores are still there in float64, and rounded off in float16
        mask = torch.zeros(B, 1, Sq, T, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    elif "bias" in words:
        mask = draw.normal(Sq, T)
    elif "mask" in words:
        mask = draw.bools(1, 1, Sq, T)
    if "causal" in words:
        kwargs["is_causal"] = 1
    if "softcap" in words:
        kwargs["softcap"] = 2.0
    if option == "scale":
        kwargs["scale"] = 0.3
    args: list[Any] = [Q, K, V, mask, *past, lengths]
    while args[-1] is None:
        args.pop()
    return Call("attention", labels(dtype=dtype, layout=layout, shape=shape, option=option), tuple(args), kwargs, dtype)


@matrix(
    "attention_with_present",
    layout=HEADS_LAST,
    shape=ATTENTION_SHAPES,
    option=("plain", "causal", "past causal", "past bias", "past softcap"),
)
def attention_with_present(
    dtype: torch.dtype, layout: str, shape: tuple[int, ...], option: str, draw: Draw
) -> Call | None:
    call = attention(dtype=dtype, layout=layout, shape=shape, option=option, draw=draw)
    return call and Call("attention_with_present", call.point, call.args, call.kwargs, dtype)


@matrix(
    "tensor_scatter",
    layout=LAYOUTS,
    shape=((1, 1, 1, 1), (2, 3, 7, 8), (3, 2, 65, 5), (2, 1, 300, 33), (1, 1, 2, 1500)),
    update=("one", "some", "all"),
    option=("start", "linear", "circular", "axis 1"),
)
def tensor_scatter(
    dtype: torch.dtype, layout: str, shape: tuple[int, ...], update: str, option: str, draw: Draw
) -> Call | None:
    B, H, T, D = shape
    S = {"one": 1, "some": (T + 1) // 2, "all": T}[update]
    axis = 1 if option == "axis 1" else 2
    sizes = [B, T, H, D] if axis == 1 else [B, H, T, D]
    cache = draw.laid_out(layout, *sizes)
    sizes[axis] = S
    new = draw.laid_out(layout, *sizes)
    kwargs: dict[str, Any] = {"axis": 1} if axis == 1 else {}
    if option == "circular":
        kwargs["mode"] = "circular"
    indices = () if option == "start" else (draw.whole(0, 2 * T if option == "circular" else T - S, B),)
    point = labels(dtype=dtype, layout=layout, shape=shape, update=update, option=option)
    return Call("tensor_scatter", point, (cache, new, *indices), kwargs, dtype)


def _heads(draw: Draw, layout: str, B: int, H: int, S: int, D: int) -> torch.Tensor:
    """[B, S, H*D] or [B, H, S, D] in one of HEADS_LAST."""
    rank, _, how = layout.partition(" ")
    shape = (B, S, H * D) if rank == "3d" else (B, H, S, D)
    return draw.laid_out(how or "contiguous", *shape)
