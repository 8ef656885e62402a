"""The calls that implementations of attention are compared over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxfuse.ops.calls import HEADS_LAST, Call, Draw, Matrix, labels

SHAPES = (
    (1, 1, 1, 1, 1, 1, 1),  # B, Hq, Hkv, Sq, Skv, D, Dv
    (2, 4, 2, 3, 5, 8, 8),
    (2, 3, 3, 7, 7, 16, 16),
    (1, 6, 2, 5, 70, 40, 24),
    (1, 8, 2, 1, 67, 64, 64),
    (1, 2, 1, 65, 129, 32, 32),
)
OPTIONS = (
    "plain", "causal", "scale", "bool mask", "bool mask causal", "head bias", "bias causal", "short mask", "softcap",
    "softcap bias causal", "past", "past causal", "past bias", "past softcap", "lengths", "lengths causal",
    "lengths mask softcap", "negative mask",
)  # fmt: skip


def attention(dtype: torch.dtype, layout: str, shape: tuple[int, ...], option: str, draw: Draw) -> Call | None:
    B, Hq, Hkv, Sq, Skv, D, Dv = shape
    words = option.split()
    Q = draw.heads(layout, B, Hq, Sq, D)
    K, V = (draw.heads(layout, B, Hkv, Skv, size) for size in (D, Dv))
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


def attention_with_present(
    dtype: torch.dtype, layout: str, shape: tuple[int, ...], option: str, draw: Draw
) -> Call | None:
    call = attention(dtype=dtype, layout=layout, shape=shape, option=option, draw=draw)
    return call and Call("attention_with_present", call.point, call.args, call.kwargs, dtype)


def _refused(
    name: str,
    is_causal: int,
    Q: Tensor | None,
    K: Tensor | None,
    V: Tensor | None,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
) -> str | None:
    assert Q is not None and K is not None
    P = 0 if past_key is None else past_key.shape[2]
    T, Sq = P + K.shape[-2 if K.dim() == 4 else 1], Q.shape[-2 if Q.dim() == 4 else 1]
    if past_key is not None and name == "attention":
        return "it does not take past_key without giving present_key"
    if past_key is not None and is_causal and Sq == 1 and T > P + 1:
        return "it leaves is_causal out where there is one query, also where there are more new keys than one"
    if mask is not None and mask.shape[-1] != T:
        return "it wants a mask as long as the keys, the specification does not"
    if mask is not None and mask.is_floating_point():
        lowest = torch.finfo(mask.dtype).min
        if bool((mask <= lowest).all(-1).any()):
            return "it gives 0 to a query whose mask is the lowest number everywhere, the formula gives the mean of V"
    return None


def refused(call: Call) -> str | None:
    return _refused(call.op, call.kwargs.get("is_causal", 0), *call.args)


def attributes(call: Call) -> dict[str, Any]:
    """Four dims say the number of heads themselves, and the specification forbids to repeat it."""
    four = call.args[0] is not None and call.args[0].dim() == 4
    return {name: value for name, value in call.kwargs.items() if not (four and name.endswith("num_heads"))}


MATRICES = {
    "attention": Matrix(
        {"layout": HEADS_LAST, "shape": SHAPES, "option": OPTIONS}, attention, refused=refused, attributes=attributes
    ),
    "attention_with_present": Matrix(
        {
            "layout": HEADS_LAST,
            "shape": SHAPES,
            "option": ("plain", "causal", "past causal", "past bias", "past softcap"),
        },
        attention_with_present,
        refused=refused,
        attributes=attributes,
    ),
}
