"""Launching the attention kernels: forward for `fxfuse::attention`, and the gradients of Q, K, V and the mask."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxfuse.kernels.launch import ceil_div, interpreted, math_dtype, power_of_two, shared_memory, triton_dtype, wrapped
from fxfuse.ops.attention.arguments import Attributes, Inputs, Maybe, Sizes
from fxfuse.ops.attention.kernels.backward import keys_kernel, queries_kernel
from fxfuse.ops.attention.kernels.forward import forward_kernel
from fxfuse.ops.attention.kernels.scores import ADDED_MASK, BOOL_MASK, NO_MASK
from fxfuse.ops.attention.math import Problem, merge_heads, problem, softmax_is_precise, split_heads

WIDEST = {2: 256, 4: 256, 8: 128}
"""Elements of a head that a program can hold, by their size in bytes."""

SPACIOUS = 160 << 10
"""Bytes of shared memory from which masks and backward kernels can fetch ahead: an A100 has them, an L4 has not."""


def unsupported(i: Inputs, a: Attributes, sizes: Sizes) -> str | None:
    """Why the forward kernel does not take this call."""
    if not softmax_is_precise(a, i.Q.dtype):
        return f"the kernel's softmax is {math_dtype(i.Q.dtype)}; softmax_precision asks for another"
    return too_wide(max(sizes.D, sizes.Dv), i.Q.dtype)


def too_wide(size: int, dtype: torch.dtype) -> str | None:
    """Why no kernel takes heads of this size."""
    widest = WIDEST[dtype.itemsize]
    return f"heads of {size} elements are wider than {widest} ({dtype})" if size > widest else None


def forward(i: Inputs, a: Attributes, sizes: Sizes, present: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Y of `fxfuse::attention`.

    Args:
        i: the operator's inputs, checked.
        a: its attributes.
        sizes: what the check said.
        present: all keys and values, where they are at hand in one piece: the past is not read then.
    """
    K, V = present or (split_heads(i.K, a.kv_num_heads), split_heads(i.V, a.kv_num_heads))
    past = None if present or i.past_key is None or i.past_value is None else (i.past_key, i.past_value)
    p = problem(i, a, sizes, K, V)
    Y = i.Q.new_empty((sizes.B, sizes.Sq, sizes.Hq, sizes.Dv))
    if sizes.T == 0:
        Y.zero_()
    elif Y.numel():
        launch_forward(p, a, past, Y=Y)
    return merge_heads(Y.transpose(1, 2), i.Q.dim())


def gradients(p: Problem, a: Attributes, grad: Tensor, *, mask_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of Q, K, V [B, H, S, ..], given Y's [B, Hq, Sq, Dv].

    With `mask_gradient` also that of the mask's full form [B, Hq, Sq, T], in float32; else something empty.
    """
    (B, Hq, Sq, D), (_, Hkv, T, Dv) = p.Q.shape, p.V.shape
    grad_Q = p.Q.new_empty((B, Sq, Hq, D)).transpose(1, 2)
    grad_K, grad_V = p.Q.new_empty((B, Hkv, T, D)), p.Q.new_empty((B, Hkv, T, Dv))
    grad_mask = p.Q.new_zeros((B, Hq, Sq, T) if mask_gradient else (0,), dtype=math_dtype(p.Q.dtype))
    if not (B and Hq and Sq and T and D and Dv):
        return grad_Q.zero_(), grad_K.zero_(), grad_V.zero_(), grad_mask
    statistics = tuple(p.Q.new_empty((B, Hq, Sq), dtype=math_dtype(p.Q.dtype)) for _ in range(3))
    launch_forward(p, a, None, grad=grad, statistics=statistics)

    mask, mask_strides, stop = full_mask(p, p.K.shape[2])
    lengths = p.Q if p.lengths is None else p.lengths
    settings, m, n = choices(p, a, backward=True)
    operands = (p.Q, p.K, p.V, mask, lengths, grad, *statistics)
    numbers = (Hkv, Hq // Hkv, Sq, T, stop, p.offset, D, Dv)
    strides = (
        *p.Q.stride(), *p.K.stride(), *p.V.stride(), *mask_strides, length_stride(p), *grad.stride()
    )  # fmt: skip
    wrapped(keys_kernel)[(B * Hkv * ceil_div(T, n),)](*operands, grad_K, grad_V, *numbers, *strides, **settings)
    wrapped(queries_kernel)[(B * Hq * ceil_div(Sq, m),)](
        *operands, grad_Q, grad_mask if mask_gradient else p.Q, *numbers, *strides,
        MASK_GRADIENT=mask_gradient, **settings,
    )  # fmt: skip
    return grad_Q, grad_K, grad_V, grad_mask


def launch_forward(
    p: Problem,
    a: Attributes,
    past: tuple[Tensor, Tensor] | None,
    *,
    Y: Maybe = None,
    grad: Maybe = None,
    statistics: tuple[Tensor, ...] = (),
) -> None:
    """Writes Y [B, Sq, Hq, Dv]; or, given Y's gradient, what the backward kernels need: m, z and delta [B, Hq, Sq]."""
    (B, Hq, Sq, D), (_, Hkv, Skv, Dv) = p.Q.shape, p.V.shape
    P = past[0].shape[2] if past else 0
    mask, mask_strides, stop = full_mask(p, P + Skv)
    settings, m, _ = choices(p, a)
    none = p.Q  # an address for what is not there
    past_k, past_v = past or (none, none)
    wrapped(forward_kernel)[(B * Hkv * ceil_div(Hq // Hkv * Sq, m),)](
        p.Q, p.K, p.V, past_k, past_v, mask, none if p.lengths is None else p.lengths,
        none if Y is None else Y, none if grad is None else grad, *(statistics or (none, none, none)),
        Hkv, Hq // Hkv, Sq, P, stop, p.offset, D, Dv,
        *p.Q.stride(), *p.K.stride(), *p.V.stride(), *past_k.stride(), *past_v.stride(), *mask_strides,
        length_stride(p), *(none if grad is None else grad).stride(),
        HAS_PAST=past is not None, STATISTICS=grad is not None, **settings,
    )  # fmt: skip


def full_mask(p: Problem, T: int) -> tuple[Tensor, tuple[int, ...], int]:
    """The mask as [B, Hq, Sq, ..], its strides, and how many of the T keys it is long."""
    if p.mask is None:
        return p.Q, (0, 0, 0, 0), T
    mask = p.mask.view(torch.int8) if p.mask.dtype == torch.bool else p.mask
    mask = mask.expand(*p.Q.shape[:3], mask.shape[-1])
    return mask, mask.stride(), min(T, mask.shape[-1])


def length_stride(p: Problem) -> int:
    return 0 if p.lengths is None else p.lengths.stride(0)


def choices(p: Problem, a: Attributes, backward: bool = False) -> tuple[dict[str, Any], int, int]:
    """The kernels' compile-time arguments, and how many queries and keys a program takes at a time."""
    (_, Hq, Sq, D), (_, Hkv, _, Dv) = p.Q.shape, p.V.shape
    math_type = math_dtype(p.Q.dtype)
    block_d, block_dv = (max(power_of_two(size), 16) for size in (D, Dv))
    # What fits the 99 KiB of shared memory that any GPU since Ampere has (tests/kernels/test_compiles.py).
    budget = 16384 // max(block_d, block_dv) * 2 // p.Q.element_size()
    m, n = (min(budget // 2, 64), min(budget // 2, 64)) if backward else (min(budget, 128), min(budget // 2, 64))
    rows = Sq if backward else Hq // Hkv * Sq
    m, n = max(min(m, power_of_two(rows)), 16), max(n, 16)
    kind = NO_MASK if p.mask is None else BOOL_MASK if p.mask.dtype == torch.bool else ADDED_MASK
    spacious = shared_memory(p.Q.device) >= SPACIOUS
    settings = {
        "SCALE": float(a.scale if a.scale is not None else 1.0 / math.sqrt(D)),
        "SOFTCAP": float(a.softcap),
        "CAUSAL": bool(a.is_causal),
        "MASKED": kind,
        "HAS_LENGTHS": p.lengths is not None,
        "MATH": triton_dtype(math_type),
        # The interpreter takes bfloat16 for integers: its products are of float32 operands, which hold the same values.
        "DOT": triton_dtype(math_type if interpreted() else p.Q.dtype),
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "num_warps": 8 if m * max(block_d, block_dv) >= 128 * 64 else 4,
        "num_stages": 2 if spacious or not (backward or kind) else 1,
    }
    return settings, m, n
