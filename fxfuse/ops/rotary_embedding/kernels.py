"""Rotary embedding in Triton, forward and backward: one pass, in whatever layout the heads come.

    y1 = x1·cos - x2·sin
    y2 = x1·sin + x2·cos        the gradient is the rotation by the opposite angle: sin → -sin

A program takes TOKENS tokens and HEADS of their heads, and reads a token's angles once for all of them. X is read as
[B, S, H, D] through its strides, so that three and four dims, transposed or not, are the same kernel. Each product is
rounded to X's type before the sum, as the specification's Mul, Sub and Add do. What lies beyond the rotated part of
a head is copied.

A position outside the caches has no angle: the result is NaN there, for looking would mean to wait for the device.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fxfuse.kernels.language import rounded
from fxfuse.kernels.launch import ceil_div, interpreted, math_dtype, power_of_two, triton_dtype, wrapped
from fxfuse.kernels.table import Kernel
from fxfuse.ops.rotary_embedding import check, heads_last, output


@triton.jit
def rotate_kernel(
    X, COS, SIN, IDS, Y, tokens, S, H, REST, positions,
    xb, xs, xh, xd, cb, cs, cd, sb, ss, sd, ib, is_, yb, ys, yh,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, HAS_IDS: tl.constexpr, MATH: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    head_blocks = tl.cdiv(H, HEADS)
    token = (tl.program_id(0) // head_blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(0) % head_blocks * HEADS + tl.arange(0, HEADS)
    b, s = token // S, token % S
    k = tl.arange(0, BLOCK).to(tl.int64)

    # The angles [TOKENS, BLOCK].
    angle = (token < tokens)[:, None] & (k < HALF)[None, :]
    outside = 0.0
    if HAS_IDS:
        position = tl.load(IDS + b * ib + s * is_, token < tokens, 0)
        angle = angle & ((position >= 0) & (position < positions))[:, None]
        outside = float("nan")
        cos_at, sin_at = position * cs, position * ss
    else:
        cos_at, sin_at = b * cb + s * cs, b * sb + s * ss
    cos = tl.load(COS + cos_at[:, None] + k[None, :] * cd, angle, outside).to(MATH)[:, None, :]
    sin = tl.load(SIN + sin_at[:, None] + k[None, :] * sd, angle, outside).to(MATH)[:, None, :]
    if INVERSE:
        sin = -sin

    # The heads [TOKENS, HEADS, BLOCK].
    x_at = (b * xb + s * xs)[:, None] + head[None, :].to(tl.int64) * xh
    y_at = (b * yb + s * ys)[:, None] + head[None, :].to(tl.int64) * yh
    some = (token < tokens)[:, None] & (head < H)[None, :]
    here = some[:, :, None] & (k < HALF)[None, None, :]
    dtype: tl.constexpr = X.dtype.element_ty
    if INTERLEAVED:
        # A pair lies side by side: read and written in one piece, [TOKENS, HEADS, 2·BLOCK].
        d = tl.arange(0, 2 * BLOCK).to(tl.int64)[None, None, :]
        both = some[:, :, None] & (d < 2 * HALF)
        x = tl.load(X + x_at[:, :, None] + d * xd, both, 0.0)
        x1, x2 = tl.split(tl.reshape(x, (TOKENS, HEADS, BLOCK, 2)))
    else:
        x1 = tl.load(X + x_at[:, :, None] + k[None, None, :] * xd, here, 0.0)
        x2 = tl.load(X + x_at[:, :, None] + (k + HALF)[None, None, :] * xd, here, 0.0)
    x1, x2 = x1.to(MATH), x2.to(MATH)
    y1 = rounded(rounded(x1 * cos, dtype).to(MATH) - rounded(x2 * sin, dtype).to(MATH), dtype)
    y2 = rounded(rounded(x1 * sin, dtype).to(MATH) + rounded(x2 * cos, dtype).to(MATH), dtype)
    if INTERLEAVED:
        tl.store(Y + y_at[:, :, None] + d, tl.interleave(y1, y2), both)
    else:
        tl.store(Y + y_at[:, :, None] + k[None, None, :], y1, here)
        tl.store(Y + y_at[:, :, None] + (k + HALF)[None, None, :], y2, here)

    if BLOCK_REST > 0:
        d = tl.arange(0, BLOCK_REST).to(tl.int64)[None, None, :]
        rest = some[:, :, None] & (d < REST)
        x = tl.load(X + x_at[:, :, None] + (d + 2 * HALF) * xd, rest, 0.0)
        tl.store(Y + y_at[:, :, None] + (d + 2 * HALF), x, rest)


def unsupported(
    X: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> None:
    """It takes all of them."""
    check(X, cos_cache, sin_cache, position_ids, interleaved, num_heads, rotary_embedding_dim)


def forward(
    X: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Y of `fxfuse::rotary_embedding`."""
    Y = output(X)
    rotate(X, Y, cos_cache, sin_cache, position_ids, interleaved, num_heads, inverse=False)
    return Y


def backward(
    grad: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """The gradient of X, given Y's."""
    grad_X = output(grad)
    rotate(grad, grad_X, cos_cache, sin_cache, position_ids, interleaved, num_heads, inverse=True)
    return grad_X


def rotate(
    X: Tensor, Y: Tensor, cos: Tensor, sin: Tensor, ids: Tensor | None, interleaved: int, num_heads: int, inverse: bool
) -> None:
    """Writes the rotated X into Y."""
    if X.numel() == 0:
        return
    x, y = heads_last(X, num_heads), heads_last(Y, num_heads)
    B, S, H, D = x.shape
    half = cos.shape[-1]
    rest = D - 2 * half
    if cos.shape[-2] == 0:  # no positions at all; Triton wants an address
        cos, sin = (cache.new_zeros((*cache.shape[:-2], 1, half)) for cache in (cos, sin))
    positions = cos.shape[0] if ids is not None else 0
    # A dimension of the batch that a cache of two dims does not have.
    c, s = ((0, *cache.stride())[-3:] for cache in (cos, sin))
    i = ids.stride() if ids is not None else (0, 0)
    block = power_of_two(half)
    block_rest = power_of_two(rest) if rest else 0
    heads = min(power_of_two(H), max((4096 if interpreted() else 2048) // (2 * block + block_rest), 1))
    tokens = min(power_of_two(B * S), max((32768 if interpreted() else 2048) // (heads * (2 * block + block_rest)), 1))
    grid = (ceil_div(B * S, tokens) * ceil_div(H, heads),)
    wrapped(rotate_kernel)[grid](
        x, cos, sin, cos if ids is None else ids, y, B * S, S, H, rest, positions,
        *x.stride(), *c, *s, *i, *y.stride()[:3],
        HALF=half, INTERLEAVED=bool(interleaved), INVERSE=inverse, HAS_IDS=ids is not None,
        MATH=triton_dtype(math_dtype(X.dtype)), TOKENS=tokens, HEADS=heads, BLOCK=block, BLOCK_REST=block_rest,
        num_warps=4,
    )  # fmt: skip


KERNELS = {
    "rotary_embedding": Kernel(unsupported, forward),
    "rotary_embedding_backward": Kernel(lambda *args, **kwargs: None, backward),
}
