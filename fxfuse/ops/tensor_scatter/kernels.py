"""TensorScatter in Triton: the cache copied and the update laid over it in one pass.

    present[b, m, t, n] = update[b, m, s, n]    if 0 <= s < S, for s = t - write_indices[b] (circular: modulo T)
                          past[b, m, t, n]      otherwise

A program takes SLOTS slots (b, m, t) and a block of their n. Elements are moved as integers of their size, so that
every type is the same kernel. A linear write that runs out of the cache is cut off: nobody looks, for looking would
mean to wait for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxfuse.kernels.launch import ceil_div, collapse, interpreted, padded, power_of_two, wrapped
from fxfuse.kernels.table import Kernel
from fxfuse.ops.tensor_scatter import check

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Types to move elements as, by their size in bytes."""


@triton.jit
def scatter_kernel(
    PAST, UPDATE, INDICES, PRESENT, slots, M, T, N, S,
    pb, pm, pt, pn, ub, um, ut, un, ib,
    HAS_INDICES: tl.constexpr, CIRCULAR: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(N, BLOCK)
    slot = (tl.program_id(0) // columns).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    n = (tl.program_id(0) % columns).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    b, m, t = slot // T // M, slot // T % M, slot % T
    s = t
    if HAS_INDICES:
        s = t - tl.load(INDICES + b * ib, slot < slots, 0)
        if CIRCULAR:
            s = (s % T + T) % T
    here = (slot < slots)[:, None] & (n < N)
    new = ((s >= 0) & (s < S))[:, None]
    past = tl.load(PAST + (b * pb + m * pm + t * pt)[:, None] + n * pn, here & ~new, 0)
    update = tl.load(UPDATE + (b * ub + m * um + s * ut)[:, None] + n * un, here & new, 0)
    tl.store(PRESENT + slot[:, None] * N + n, tl.where(new, update, past), here)


def unsupported(
    past_cache: Tensor, update: Tensor, write_indices: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> str | None:
    check(past_cache, update, write_indices, axis, mode)
    size = past_cache.element_size()
    return None if size in INTEGERS else f"elements of {size} bytes ({past_cache.dtype})"


def forward(
    past_cache: Tensor, update: Tensor, write_indices: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    """present of `fxfuse::tensor_scatter`."""
    axis %= past_cache.dim()
    present = torch.empty(past_cache.shape, dtype=past_cache.dtype, device=past_cache.device)
    if present.numel() == 0:
        return present
    bits = INTEGERS[past_cache.element_size()]
    past, p = four_dims(past_cache, axis)
    new, u = four_dims(update, axis)
    B, M, T, N = past.shape[0], past.shape[1:axis].numel(), past.shape[axis], past.shape[axis + 1 :].numel()
    block = min(power_of_two(N), 1024)
    slots = min(power_of_two(B * M * T), (32768 if interpreted() else 4096) // block)
    grid = (ceil_div(B * M * T, slots) * ceil_div(N, block),)
    wrapped(scatter_kernel)[grid](
        past.view(bits), new.view(bits), past if write_indices is None else write_indices, present.view(bits),
        B * M * T, M, T, N, update.shape[axis], *p, *u, 0 if write_indices is None else write_indices.stride(0),
        HAS_INDICES=write_indices is not None, CIRCULAR=mode == "circular", SLOTS=slots, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return present


def four_dims(tensor: Tensor, axis: int) -> tuple[Tensor, list[int]]:
    """The tensor and its strides as [B, M, T or S, N]; copied if the dims before or after the axis do not merge."""
    shape, stride = tensor.shape, tensor.stride()
    m = padded(collapse(shape[1:axis], (stride[1:axis],)), 1)
    n = padded(collapse(shape[axis + 1 :], (stride[axis + 1 :],)), 1)
    if m is None or n is None:
        return four_dims(tensor.contiguous(), axis)
    return tensor, [stride[0], m[1][0][0], stride[axis], n[1][0][0]]


KERNELS = {"tensor_scatter": Kernel(unsupported, forward)}
