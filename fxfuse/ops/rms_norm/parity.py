"""The calls that RMSNorm's implementations are compared over."""

from __future__ import annotations

from typing import Any

import torch

from fxfuse.ops.calls import LAYOUTS, Call, Draw, Matrix, labels


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


def refused(call: Call) -> str | None:
    X, scale = call.args
    assert X is not None and scale is not None
    return "it wants X and scale of one type, the specification does not" if X.dtype != scale.dtype else None


MATRICES = {
    "rms_norm": Matrix(
        {
            "layout": LAYOUTS,
            "shape": ((1, 1, 1), (2, 3, 7), (3, 5, 64), (1, 2, 129), (5, 83, 96), (2, 2, 4097)),
            "option": (
                "plain",
                "epsilon",
                "half stash",
                "double stash",
                "wide scale",
                "two axes",
                "scalar",
                "scale by row",
            ),
        },
        rms_norm,
        exactly={"stash_type": 11},
        refused=refused,
    )
}
