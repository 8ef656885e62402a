"""RMSNorm in Triton: one pass over a row, which stays in registers.

    n = x / sqrt(mean(x²) + epsilon)
    y = n · w

    grad_x = (g·w - n · mean(g·w·n)) / sqrt(mean(x²) + epsilon)
    grad_w = Σ g·n                                               over all rows that share w

A program takes ROWS rows of X, each of N elements (BLOCK: the next power of two). Rounded where the operator rounds:
x to the stash type, n to it and then to X's type. Rows of more than LONGEST elements are left to the composite.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxfuse.kernels.language import rounded
from fxfuse.kernels.launch import (
    ceil_div,
    collapse,
    interpreted,
    math_dtype,
    padded,
    power_of_two,
    processors,
    triton_dtype,
    wrapped,
)
from fxfuse.kernels.table import Kernel
from fxfuse.ops.arguments import onnx_float
from fxfuse.ops.rms_norm import check

LONGEST = 65536
"""Elements of a row that a program can hold: 64 float32 registers in each of 1024 threads."""


@triton.jit
def offsets(row, column, size1, size2, stride0, stride1, stride2, stride_n):
    """Where the elements of the rows lie, the rows being counted through three dims [.., size1, size2]."""
    i0, i1, i2 = row // size2 // size1, row // size2 % size1, row % size2
    return i0 * stride0 + i1 * stride1 + i2 * stride2 + column * stride_n


@triton.jit
def normalized(X, at, here, N, EPSILON: tl.constexpr, STASH: tl.constexpr, MATH: tl.constexpr):
    """Every row of X over its root mean square, and one over that."""
    x = rounded(tl.load(X + at, here, 0.0).to(MATH), STASH).to(MATH)
    r = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / N + EPSILON)
    return x * r, r


@triton.jit
def forward_kernel(
    X, W, Y, rows, N, size1, size2, x0, x1, x2, xn, w0, w1, w2, wn,
    EPSILON: tl.constexpr, STASH: tl.constexpr, MATH: tl.constexpr, PRODUCT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    here = (row < rows) & (column < N)
    n, _ = normalized(X, offsets(row, column, size1, size2, x0, x1, x2, xn), here, N, EPSILON, STASH, MATH)
    n = rounded(rounded(n, STASH).to(MATH), X.dtype.element_ty)
    w = tl.load(W + offsets(row, column, size1, size2, w0, w1, w2, wn), here, 0.0)
    tl.store(Y + row * N + column, rounded(n.to(PRODUCT) * w.to(PRODUCT), Y.dtype.element_ty), here)


@triton.jit
def backward_kernel(
    G, X, W, GX, GW, rows, N, size1, size2, x0, x1, x2, xn, w0, w1, w2, wn,
    EPSILON: tl.constexpr, STASH: tl.constexpr, MATH: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # SHARED: all rows have the same w. A program then adds up its rows' part of grad_w, row `program_id` of GW.
    column = tl.arange(0, BLOCK)[None, :]
    sums = tl.zeros((ROWS, BLOCK), MATH)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        here = (row < rows) & (column < N)
        n, r = normalized(X, offsets(row, column, size1, size2, x0, x1, x2, xn), here, N, EPSILON, STASH, MATH)
        g = tl.load(G + row * N + column, here, 0.0).to(MATH)
        w = tl.load(W + offsets(row, column, size1, size2, w0, w1, w2, wn), here, 0.0).to(MATH)
        gx = r * (g * w - n * (tl.sum(g * w * n, 1, keep_dims=True) / N))
        tl.store(GX + row * N + column, rounded(gx, GX.dtype.element_ty), here)
        gw = g * rounded(n, X.dtype.element_ty).to(MATH)
        if SHARED:
            sums += gw
        else:
            tl.store(GW + row * N + column, gw, here)
    if SHARED:
        at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, BLOCK)
        tl.store(GW + at, tl.sum(sums, 0), tl.arange(0, BLOCK) < N)


class Call(NamedTuple):
    """The operands as [rows, N], and how they are cut into blocks."""

    X: Tensor
    W: Tensor
    rows: int
    N: int
    layout: list[int]
    """Sizes of the last two of three row dims; X's strides along the three and in a row; W's."""
    shared: bool
    meta: dict[str, Any]


def prepared(X: Tensor, scale: Tensor, axis: int, epsilon: float, stash: torch.dtype) -> Call:
    axis %= X.dim()
    N = X.shape[axis:].numel()
    rows = X.shape[:axis].numel()
    W = scale.expand(X.shape)
    layout = laid_out(X, W, axis)
    if layout is None:
        X = X.contiguous()
        layout = laid_out(X, W, axis)
    if layout is None:
        W = W.contiguous()
        layout = laid_out(X, W, axis)
    assert layout is not None
    shared = all(layout[stride] == 0 for stride in (6, 7, 8))
    block = power_of_two(N)
    elements = 8192 if interpreted() else 4096
    per_program = min(max(elements // block, 1), power_of_two(rows))
    meta = {
        "EPSILON": float(epsilon),
        "STASH": triton_dtype(stash),
        "MATH": triton_dtype(math_dtype(stash)),
        "ROWS": per_program,
        "BLOCK": block,
        "num_warps": min(max(block * per_program // 512, 1), 16 if block <= 16384 else 32),
    }
    return Call(X, W, rows, N, layout, shared, meta)


def laid_out(X: Tensor, W: Tensor, axis: int) -> list[int] | None:
    """`Call.layout`; None if the rows need more than three dims, or a row more than one."""
    outer = padded(collapse(X.shape[:axis], (X.stride()[:axis], W.stride()[:axis])), 3)
    inner = padded(collapse(X.shape[axis:], (X.stride()[axis:], W.stride()[axis:])), 1)
    if outer is None or inner is None:
        return None
    (_, size1, size2), (x_outer, w_outer) = outer
    _, ((xn,), (wn,)) = inner
    # Columns are counted in 32 bits.
    if max(xn, wn) * X.shape[axis:].numel() >= 2**31:
        return None
    return [size1, size2, *x_outer, xn, *w_outer, wn]


def unsupported(X: Tensor, scale: Tensor, **attributes: Any) -> str | None:
    check(X, scale, attributes.get("axis", -1))
    onnx_float(attributes.get("stash_type", 1), "stash_type")
    return too_long(X, attributes.get("axis", -1))


def backward_unsupported(grad: Tensor, X: Tensor, scale: Tensor, **attributes: Any) -> str | None:
    return too_long(X, attributes.get("axis", -1))


def too_long(X: Tensor, axis: int) -> str | None:
    """Why no kernel takes rows of this length."""
    N = X.shape[axis % X.dim() :].numel()
    return f"a row of {N} elements is longer than {LONGEST}" if N > LONGEST else None


def forward(X: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    """Y of `fxfuse::rms_norm`."""
    Y = torch.empty(X.shape, dtype=scale.dtype, device=X.device)
    if X.numel() == 0:
        return Y
    c = prepared(X, scale, axis, epsilon, onnx_float(stash_type, "stash_type"))
    product = triton_dtype(math_dtype(X.dtype, scale.dtype))
    grid = (ceil_div(c.rows, c.meta["ROWS"]),)
    wrapped(forward_kernel)[grid](c.X, c.W, Y, c.rows, c.N, *c.layout, PRODUCT=product, **c.meta)
    return Y


def backward(
    grad: Tensor, X: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> tuple[Tensor, Tensor]:
    """The gradients of X and scale, given Y's."""
    grad_X = torch.empty(X.shape, dtype=X.dtype, device=X.device)
    if X.numel() == 0:
        return grad_X, torch.zeros(scale.shape, dtype=scale.dtype, device=X.device)
    c = prepared(X, scale, axis, epsilon, onnx_float(stash_type, "stash_type"))
    # Every program writes a row of sums: few programs where rows are long.
    programs = min(ceil_div(c.rows, c.meta["ROWS"]), max(min(8192 // c.meta["BLOCK"], 4), 1) * processors(X.device))
    math = math_dtype(onnx_float(stash_type, "stash_type"))
    parts = torch.empty((programs if c.shared else c.rows, c.N), dtype=math, device=X.device)
    wrapped(backward_kernel)[(programs,)](
        grad.contiguous(), c.X, c.W, grad_X, parts, c.rows, c.N, *c.layout, SHARED=c.shared, **c.meta
    )
    axis %= X.dim()
    if c.shared:
        total = parts.sum(0).view([1] * axis + list(X.shape[axis:]))
    else:
        total = parts.view(X.shape)
    return grad_X, total.sum_to_size(scale.shape).to(scale.dtype)


KERNELS = {
    "rms_norm": Kernel(unsupported, forward),
    "rms_norm_backward": Kernel(backward_unsupported, backward),
}
