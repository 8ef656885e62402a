"""The calls that implementations of a write into a cache are compared over."""

from __future__ import annotations

from typing import Any

import torch

from fxfuse.ops.calls import LAYOUTS, Call, Draw, Matrix, labels


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


MATRICES = {
    "tensor_scatter": Matrix(
        {
            "layout": LAYOUTS,
            "shape": ((1, 1, 1, 1), (2, 3, 7, 8), (3, 2, 65, 5), (2, 1, 300, 33), (1, 1, 2, 1500)),
            "update": ("one", "some", "all"),
            "option": ("start", "linear", "circular", "axis 1"),
        },
        tensor_scatter,
        differentiable=False,
    )
}
