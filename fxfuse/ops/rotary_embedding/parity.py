"""The calls that implementations of rotary embeddings are compared over."""

from __future__ import annotations

import torch

from fxfuse.ops.calls import HEADS_LAST, Call, Draw, Matrix, labels


def rotary_embedding(
    dtype: torch.dtype, layout: str, shape: tuple[int, ...], option: str, angles: str, draw: Draw
) -> Call | None:
    B, S, H, D = shape
    X, kwargs = draw.heads(layout, B, H, S, D), {}
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


MATRICES = {
    "rotary_embedding": Matrix(
        {
            "layout": HEADS_LAST,
            "shape": ((1, 1, 1, 2), (2, 3, 5, 8), (1, 7, 4, 80), (2, 129, 3, 64), (1, 2, 33, 128)),
            "option": ("halves", "interleaved", "partial", "partial interleaved"),
            "angles": ("ready", "expanded", "positions"),
        },
        rotary_embedding,
    )
}
