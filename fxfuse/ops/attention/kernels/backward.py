"""Attention backward in Triton: the weights are computed again from the saved statistics, block by block.

    p  = e^(s - m) / z                      grad_V = Σ pᵀ·g
    t  = p · (g·vᵀ - delta)                 grad of the mask
    ds = t · (1 - (capped / c)²) · scale    grad_Q = Σ ds·k,   grad_K = Σ dsᵀ·q

m = max s, z = Σ e^(s - m) and delta = Σ y·g of every query come from the forward kernel; c is the soft-cap. One
kernel goes through the queries for a block of keys, one through the keys for a block of queries: nobody adds to what
another program writes, so that the result is the same every time.
"""

import triton
import triton.language as tl

from fxfuse.kernels.language import rounded
from fxfuse.ops.attention.kernels.scores import scores, tile


@triton.jit
def weights_and_slopes(
    q, k, v, g, m, z, delta, i, j, valid, stop, offset, MASK, mj,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """p, t and ds [queries, keys]."""
    s, capped = scores(q, k, i, j, valid, stop, offset, MASK, mj, SCALE, SOFTCAP, CAUSAL, MASKED, MATH)
    p = tl.exp(s - m[:, None]) / z[:, None]
    t = p * (tl.dot(g, tl.trans(v), input_precision="ieee", out_dtype=MATH) - delta[:, None])
    ds = t * SCALE
    if SOFTCAP > 0.0:
        ds *= 1.0 - (capped / SOFTCAP) * (capped / SOFTCAP)
    return p, t, ds


@triton.jit
def keys_kernel(
    Q, K, V, MASK, LENGTHS, G, TOP, SUM, DELTA, GK, GV,
    Hkv, GROUP, Sq, T, stop, shift, D, DV,
    qb, qh, qi, qd, kb, kh, kj, kd, vb, vh, vj, vd, mb, mh, mi, mj, lb, gb, gh, gi, gd,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, MATH: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """grad_K and grad_V, [B, Hkv, T, ..] contiguous, of BLOCK_N keys."""
    blocks = tl.cdiv(T, BLOCK_N)
    first = tl.program_id(0) % blocks * BLOCK_N
    b = (tl.program_id(0) // blocks // Hkv).to(tl.int64)
    kv_head = (tl.program_id(0) // blocks % Hkv).to(tl.int64)
    j = first.to(tl.int64) + tl.arange(0, BLOCK_N)

    stop, offset = tl.cast(stop, tl.int64), tl.cast(shift, tl.int64)
    if HAS_LENGTHS:
        length = tl.load(LENGTHS + b * lb)
        stop, offset = tl.minimum(stop, length), length - Sq
    first_query = tl.cast(0, tl.int64)
    if CAUSAL:
        first_query = tl.maximum(first - offset, 0) // BLOCK_M * BLOCK_M
    # No query sees the keys from `stop` on.
    last_query = tl.where(first < stop, Sq, 0)

    k = tile(K + b * kb + kv_head * kh, j, j < T, kj, D, kd, DOT, BLOCK_D)
    v = tile(V + b * vb + kv_head * vh, j, j < T, vj, DV, vd, DOT, BLOCK_DV)
    gk = tl.zeros((BLOCK_N, BLOCK_D), MATH)
    gv = tl.zeros((BLOCK_N, BLOCK_DV), MATH)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        for start in range(first_query, last_query, BLOCK_M):
            i = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_M)
            valid = i < Sq
            q = tile(Q + b * qb + head * qh, i, valid, qi, D, qd, DOT, BLOCK_D)
            g = tile(G + b * gb + head * gh, i, valid, gi, DV, gd, DOT, BLOCK_DV)
            row = (b * Hkv * GROUP + head) * Sq + i
            m, z = tl.load(TOP + row, valid, 0.0), tl.load(SUM + row, valid, float("inf"))
            delta = tl.load(DELTA + row, valid, 0.0)
            p, _, ds = weights_and_slopes(
                q, k, v, g, m, z, delta, i, j, valid, stop, offset, MASK + b * mb + head * mh + i * mi, mj,
                SCALE, SOFTCAP, CAUSAL, MASKED, MATH,
            )  # fmt: skip
            gv += tl.dot(tl.trans(rounded(p, V.dtype.element_ty).to(DOT)), g, input_precision="ieee", out_dtype=MATH)
            gk += tl.dot(tl.trans(rounded(ds, Q.dtype.element_ty).to(DOT)), q, input_precision="ieee", out_dtype=MATH)
    row = ((b * Hkv + kv_head) * T + j)[:, None]
    d, e = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    tl.store(GK + row * D + d, rounded(gk, GK.dtype.element_ty), (j < T)[:, None] & (d < D))
    tl.store(GV + row * DV + e, rounded(gv, GV.dtype.element_ty), (j < T)[:, None] & (e < DV))


@triton.jit
def queries_kernel(
    Q, K, V, MASK, LENGTHS, G, TOP, SUM, DELTA, GQ, GM,
    Hkv, GROUP, Sq, T, stop, shift, D, DV,
    qb, qh, qi, qd, kb, kh, kj, kd, vb, vh, vj, vd, mb, mh, mi, mj, lb, gb, gh, gi, gd,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, MASK_GRADIENT: tl.constexpr, MATH: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """grad_Q [B, Sq, Hq, D] of BLOCK_M queries of a head; with MASK_GRADIENT their rows of GM [B, Hq, Sq, T] too."""
    blocks = tl.cdiv(Sq, BLOCK_M)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    heads = Hkv * GROUP
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    kv_head = head // GROUP
    valid = i < Sq

    stop, offset = tl.cast(stop, tl.int64), tl.cast(shift, tl.int64)
    if HAS_LENGTHS:
        length = tl.load(LENGTHS + b * lb)
        stop, offset = tl.minimum(stop, length), length - Sq
    if CAUSAL:
        stop = tl.minimum(stop, tl.max(tl.where(valid, i, 0)) + offset + 1)

    q = tile(Q + b * qb + head * qh, i, valid, qi, D, qd, DOT, BLOCK_D)
    g = tile(G + b * gb + head * gh, i, valid, gi, DV, gd, DOT, BLOCK_DV)
    row = (b * heads + head) * Sq + i
    m, z = tl.load(TOP + row, valid, 0.0), tl.load(SUM + row, valid, float("inf"))
    delta = tl.load(DELTA + row, valid, 0.0)
    gq = tl.zeros((BLOCK_M, BLOCK_D), MATH)
    for start in range(0, stop, BLOCK_N):
        j = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_N)
        k = tile(K + b * kb + kv_head * kh, j, j < stop, kj, D, kd, DOT, BLOCK_D)
        v = tile(V + b * vb + kv_head * vh, j, j < stop, vj, DV, vd, DOT, BLOCK_DV)
        _, t, ds = weights_and_slopes(
            q, k, v, g, m, z, delta, i, j, valid, stop, offset, MASK + b * mb + head * mh + i * mi, mj,
            SCALE, SOFTCAP, CAUSAL, MASKED, MATH,
        )  # fmt: skip
        gq += tl.dot(rounded(ds, Q.dtype.element_ty).to(DOT), k, input_precision="ieee", out_dtype=MATH)
        if MASK_GRADIENT:
            tl.store(GM + row[:, None] * T + j[None, :], t, valid[:, None] & (j < stop)[None, :])
    d = tl.arange(0, BLOCK_D)[None, :]
    at = ((b * Sq + i) * heads + head)[:, None] * D + d
    tl.store(GQ + at, rounded(gq, GQ.dtype.element_ty), valid[:, None] & (d < D))
