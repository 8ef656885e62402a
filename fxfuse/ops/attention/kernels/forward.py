"""Attention forward in Triton: the softmax taken block of keys by block of keys, nothing of size Sq × T is stored.

    m' = max(m, s)      z' = z·e^(m - m') + Σ e^(s - m')      acc' = acc·e^(m - m') + e^(s - m')·v
    y = acc / z         a query that sees no key gives 0

A program takes BLOCK_M queries of one KV head: those of all query heads that share it stand below each other (row r is
query r % Sq of the group's head r // Sq), so that K and V are read once for the group. Keys come from the past, then
from K; of a cache only the first nonpad_kv_seqlen are read.

With STATISTICS the kernel gives what the backward pass needs instead of y: m, z and Σ y·grad of every query. (Not
m + log z: where all scores are the lowest float, as models mask, log z would be lost in m.)
"""

import triton
import triton.language as tl

from fxfuse.kernels.language import rounded
from fxfuse.ops.attention.kernels.scores import scores, tile


@triton.jit
def attend(
    acc, m, z, q, i, valid, K, V, MASK, first, stop, offset, D, DV, kj, kd, vj, vd, mj,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    MATH: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The running softmax after the keys first..stop."""
    for start in range(first, stop, BLOCK_N):
        j = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_N)
        k = tile(K, j, j < stop, kj, D, kd, DOT, BLOCK_D)
        s, _ = scores(q, k, i, j, valid, stop, offset, MASK, mj, SCALE, SOFTCAP, CAUSAL, MASKED, MATH)
        m_new = tl.maximum(m, tl.max(s, 1))
        # Nothing seen so far: any number will do in place of -inf, whose difference with itself is none.
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp(s - base[:, None])
        kept = tl.exp(m - base)
        z = z * kept + tl.sum(p, 1)
        v = tile(V, j, j < stop, vj, DV, vd, DOT, BLOCK_DV)
        acc = acc * kept[:, None] + tl.dot(
            rounded(p, V.dtype.element_ty).to(DOT), v, input_precision="ieee", out_dtype=MATH
        )
        m = m_new
    return acc, m, z


@triton.jit
def forward_kernel(
    Q, K, V, PAST_K, PAST_V, MASK, LENGTHS, Y, GRAD, TOP, SUM, DELTA,
    Hkv, G, Sq, P, T, shift, D, DV,
    qb, qh, qi, qd, kb, kh, kj, kd, vb, vh, vj, vd, pkb, pkh, pkj, pkd, pvb, pvh, pvj, pvd, mb, mh, mi, mj, lb,
    gb, gh, gi, gd,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_PAST: tl.constexpr, STATISTICS: tl.constexpr,
    MATH: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(G * Sq, BLOCK_M)
    row = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    b = (tl.program_id(0) // blocks // Hkv).to(tl.int64)
    kv_head = (tl.program_id(0) // blocks % Hkv).to(tl.int64)
    valid = row < G * Sq
    i, head = (row % Sq).to(tl.int64), kv_head * G + row // Sq

    # Which keys: T are there, of which the first P lie in PAST_K and PAST_V.
    stop, offset = tl.cast(T, tl.int64), tl.cast(shift, tl.int64)
    if HAS_LENGTHS:
        length = tl.load(LENGTHS + b * lb)
        stop, offset = tl.minimum(stop, length), length - Sq
    if CAUSAL:
        stop = tl.minimum(stop, tl.max(tl.where(valid, i, 0)) + offset + 1)

    q = tile(Q + b * qb, head * qh + i * qi, valid, 1, D, qd, DOT, BLOCK_D)
    mask_rows = MASK + b * mb + head * mh + i * mi
    acc = tl.zeros((BLOCK_M, BLOCK_DV), MATH)
    m = tl.full((BLOCK_M,), float("-inf"), MATH)
    z = tl.zeros((BLOCK_M,), MATH)
    if HAS_PAST:
        acc, m, z = attend(
            acc, m, z, q, i, valid, PAST_K + b * pkb + kv_head * pkh, PAST_V + b * pvb + kv_head * pvh, mask_rows,
            0, tl.minimum(stop, P), offset, D, DV, pkj, pkd, pvj, pvd, mj,
            SCALE, SOFTCAP, CAUSAL, MASKED, MATH, DOT, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    # Keys are counted from the first of the past on: K and V begin P before what they hold.
    before = tl.cast(P, tl.int64)
    K, V = K + b * kb + kv_head * kh - before * kj, V + b * vb + kv_head * vh - before * vj
    acc, m, z = attend(
        acc, m, z, q, i, valid, K, V, mask_rows, P, stop, offset, D, DV, kj, kd, vj, vd, mj,
        SCALE, SOFTCAP, CAUSAL, MASKED, MATH, DOT, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip

    seen = z > 0.0
    y = acc / tl.where(seen, z, 1.0)[:, None]
    if STATISTICS:
        # Rows of [B, Hq, Sq]. A query that sees nothing has scores of -inf, and e^(-inf - 0) is the weight 0 it needs.
        at = (b * Hkv * G + head) * Sq + i
        tl.store(TOP + at, tl.where(seen, m, 0.0), valid)
        tl.store(SUM + at, tl.where(seen, z, 1.0), valid)
        grad = tile(GRAD + b * gb, head * gh + i * gi, valid, 1, DV, gd, MATH, BLOCK_DV)
        tl.store(DELTA + at, tl.sum(y * grad, 1), valid)
    else:
        e = tl.arange(0, BLOCK_DV)[None, :]
        at = ((b * Sq + i) * Hkv * G + head)[:, None] * DV + e
        tl.store(Y + at, rounded(y, Y.dtype.element_ty), valid[:, None] & (e < DV))
