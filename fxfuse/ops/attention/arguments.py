"""The arguments of Attention: names, defaults, sizes, and what does not fit.

Shapes: Q [B, Hq, Sq, D], K [B, Hkv, Skv, D], V [B, Hkv, Skv, Dv] or their three-dimensional forms [B, S, H*D];
T = P + Skv keys in all, of which P come from the past.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxfuse.ops.arguments import differ, exceeds, onnx_float, refuse, show

Maybe = Tensor | None


class Inputs(NamedTuple):
    """The operators' inputs, as they come."""

    Q: Tensor
    K: Tensor
    V: Tensor
    attn_mask: Maybe = None
    past_key: Maybe = None
    past_value: Maybe = None
    nonpad_kv_seqlen: Maybe = None


class Attributes(NamedTuple):
    """The operators' attributes, with ONNX's names and defaults."""

    is_causal: int = 0
    kv_num_heads: int = 0
    q_num_heads: int = 0
    qk_matmul_output_mode: int = 0
    scale: float | None = None
    softcap: float = 0.0
    softmax_precision: int | None = None
    left_window_size: int = -1
    right_window_size: int = -1


class Sizes(NamedTuple):
    """The sizes of a call, each an int or a symbol."""

    B: int
    Hq: int
    Hkv: int
    Sq: int
    P: int
    T: int
    D: int
    Dv: int


def check(i: Inputs, a: Attributes) -> Sizes:
    """The sizes of the call; raises FxfuseError, naming the argument, if the arguments do not fit together."""
    Q, K, V = i.Q, i.K, i.V
    if not Q.is_floating_point():
        refuse(f"Q must be floating point, it is {Q.dtype}", "Q")
    if Q.dim() not in (3, 4):
        refuse(f"Q must be [B, Hq, Sq, D] or [B, Sq, Hq*D], it is {show(Q)}", "Q")
    for name, tensor in (("K", K), ("V", V), ("past_key", i.past_key), ("past_value", i.past_value)):
        if tensor is None:
            continue
        rank = 4 if name.startswith("past") else Q.dim()
        if tensor.dim() != rank:
            refuse(f"{name} must have {rank} dims, it is {show(tensor)}", name)
        if tensor.dtype != Q.dtype:
            refuse(f"{name} is {tensor.dtype}, Q is {Q.dtype}: they must be the same", name)
        if differ(tensor.shape[0], Q.shape[0]):
            refuse(f"{name} {show(tensor)} and Q {show(Q)}: batch differs", name)
    Hq, Sq, D = _heads(Q, a.q_num_heads, "Q", "q_num_heads")
    Hkv, Skv, Dk = _heads(K, a.kv_num_heads, "K", "kv_num_heads")
    Hv, Sv, Dv = _heads(V, a.kv_num_heads, "V", "kv_num_heads")
    if differ(D, Dk):
        refuse(f"the heads of Q have {D} elements, those of K {Dk}", "K")
    fits = not (differ(Hkv, Hv) or differ(Skv, Sv))
    if not fits:
        refuse(f"K {show(K)} and V {show(V)} differ in heads or length", "V")
    if differ(Hq % Hkv, 0):
        refuse(f"{Hq} query heads do not divide into {Hkv} key heads", "q_num_heads")
    P: int = 0
    if (i.past_key is None) != (i.past_value is None):
        refuse("past_key and past_value go together", "past_key")
    for name, past, size in (("past_key", i.past_key, D), ("past_value", i.past_value, Dv)):
        if past is not None:
            P = past.shape[2] if name == "past_key" else P
            fits = not (differ(past.shape[1], Hkv) or differ(past.shape[2], P) or differ(past.shape[3], size))
            if not fits:
                refuse(f"{name} must be [B, {Hkv}, {P}, {size}], it is {show(past)}", name)
    B, T = Q.shape[0], P + Skv
    if i.nonpad_kv_seqlen is not None:
        lengths, name = i.nonpad_kv_seqlen, "nonpad_kv_seqlen"
        if i.past_key is not None:
            refuse("nonpad_kv_seqlen is for a cache in K and V, without past_key", name)
        if lengths.dtype != torch.int64:
            refuse(f"{name} must be int64, it is {lengths.dtype}", name)
        fits = lengths.dim() == 1 and not differ(lengths.shape[0], B)
        if not fits:
            refuse(f"{name} must be [{B}], it is {show(lengths)}", name)
    if i.attn_mask is not None:
        _check_mask(i.attn_mask, Q.dtype, (B, Hq, Sq, T))
    if a.is_causal not in (0, 1):
        refuse(f"is_causal must be 0 or 1, it is {a.is_causal}", "is_causal")
    mode = a.qk_matmul_output_mode
    if mode not in (0, 1, 2, 3):
        refuse(f"qk_matmul_output_mode must be 0 to 3, it is {mode}", "qk_matmul_output_mode")
    if a.softcap < 0.0:
        refuse(f"softcap must not be negative, it is {a.softcap}", "softcap")
    for name, size in (("left_window_size", a.left_window_size), ("right_window_size", a.right_window_size)):
        if size < -1:
            refuse(f"{name} must be -1 (no window) or more, it is {size}", name)
    if a.softmax_precision is not None:
        onnx_float(a.softmax_precision, "softmax_precision")
    return Sizes(B, Hq, Hkv, Sq, P, T, D, Dv)


def _heads(tensor: Tensor, count: int, name: str, attribute: str) -> tuple[int, int, int]:
    """Heads, length and head size of a query, key or value."""
    if tensor.dim() == 4:
        heads, length, size = tensor.shape[1:]
        fits = count == 0 or not differ(count, heads)
        if not fits:
            refuse(f"{name} {show(tensor)} has {heads} heads, {attribute} says {count}", attribute)
        return heads, length, size
    if count <= 0:
        refuse(f"{name} {show(tensor)} has three dims: its number of heads must be given", attribute)
    hidden = tensor.shape[2]
    if differ(hidden % count, 0):
        refuse(f"{name} {show(tensor)} does not divide into {count} heads", attribute)
    return count, tensor.shape[1], hidden // count


def _check_mask(mask: Tensor, dtype: torch.dtype, full: tuple[int, ...]) -> None:
    if mask.dtype not in (torch.bool, dtype):
        refuse(f"attn_mask must be bool or {dtype}, it is {mask.dtype}", "attn_mask")
    want = f"attn_mask must broadcast to [{', '.join(map(str, full))}], it is {show(mask)}"
    if not (1 <= mask.dim() <= 4):
        refuse(want, "attn_mask")
    for have, size in zip(mask.shape[-2::-1], full[-2::-1], strict=False):
        if differ(have, size) and differ(have, 1):
            refuse(want, "attn_mask")
    if exceeds(mask.shape[-1], full[-1]):
        refuse(want, "attn_mask")
