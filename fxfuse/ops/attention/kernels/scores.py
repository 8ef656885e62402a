"""The scores of attention in Triton, which the forward and both backward kernels share.

    s = softcap(q·kᵀ·scale) + mask,    -∞ where query i does not see key j

softcap(x) = c·tanh(x / c). Query i sees key j if j < stop, where causal if j <= i + offset, and where the mask is bool
if it says so. Everything is computed in MATH: float32, or float64 for float64 operands. Products are of operands in
DOT, summed in MATH; those of float32 are not cut to TF32 (`input_precision="ieee"`).
"""

import triton
import triton.language as tl

from fxfuse.kernels.language import tanh

NO_MASK, BOOL_MASK, ADDED_MASK = 0, 1, 2
"""Values of the kernels' MASKED."""

BOOL: tl.constexpr = tl.constexpr(BOOL_MASK)


@triton.jit
def tile(X, row, valid, stride, size, stride_d, DOT: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of X as an operand of a product, [rows, BLOCK]; zeros where a row is not valid, and from `size` on."""
    d = tl.arange(0, BLOCK)
    at = row[:, None] * stride + d[None, :].to(tl.int64) * stride_d
    return tl.load(X + at, valid[:, None] & (d < size)[None, :], 0.0).to(DOT)


@triton.jit
def scores(
    q, k, i, j, valid, stop, offset, MASK, mask_j,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """s [queries, keys], and the scores before the mask. MASK: addresses of the queries' rows in it."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=MATH) * SCALE
    if SOFTCAP > 0.0:
        s = SOFTCAP * tanh(s / SOFTCAP)
    capped = s
    seen = (j < stop)[None, :]
    if CAUSAL:
        seen = seen & (j[None, :] <= i[:, None] + offset)
    if MASKED > 0:
        mask = tl.load(MASK[:, None] + j[None, :] * mask_j, valid[:, None] & (j < stop)[None, :], 0)
        if MASKED == BOOL:
            seen = seen & (mask != 0)
        else:
            s += mask.to(MATH)
    return tl.where(seen, s, float("-inf")), capped
