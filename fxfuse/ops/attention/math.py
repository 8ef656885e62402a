"""What Attention of ONNX computes: mask, scores, the fast way and the spelled-out way, gradients.

    Y = softmax(softcap(Q·Kᵀ·scale) + mask) · V        keys and values: past, then new

`arguments.py` names the arguments and their shapes; `__init__.py` makes operators of this.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.ops.arguments import equal, onnx_float
from fxfuse.ops.attention.arguments import Attributes, Inputs, Maybe, Sizes

SDPA = torch.ops.aten.scaled_dot_product_attention.default
"""Not by its name in torch.nn.functional, which exporters replace while they work (transformers' exporter_onnx.py,
`_patch_sdpa`, zeroes rows that see nothing)."""


class Problem(NamedTuple):
    """A call with heads split and the past joined on: all tensors have four dims."""

    Q: Tensor
    K: Tensor
    V: Tensor
    mask: Maybe
    """The caller's, and the window."""
    lengths: Maybe
    """How many keys are valid, per batch element [B]; None: all."""
    offset: int
    """With is_causal: query i sees key j if j <= i + offset. Unused when `lengths` is given."""


def split_heads(tensor: Tensor, count: int) -> Tensor:
    """[B, S, H*D] as [B, H, S, D], a view; four dims as they are."""
    if tensor.dim() == 4:
        return tensor
    return torch.unflatten(tensor, 2, (count, tensor.shape[2] // count)).transpose(1, 2)


def merge_heads(tensor_BHSD: Tensor, rank: int) -> Tensor:
    """The inverse of `split_heads`."""
    return tensor_BHSD if rank == 4 else tensor_BHSD.transpose(1, 2).flatten(2)


def joined(past: Maybe, new: Tensor) -> Tensor:
    return new if past is None else torch.cat((past, new), 2)


def problem(i: Inputs, a: Attributes, sizes: Sizes, K: Tensor, V: Tensor) -> Problem:
    """The call with K and V [B, Hkv, T, D] being all the keys and values there are."""
    mask = i.attn_mask
    if mask is not None and mask.dim() == 1:
        mask = mask.unsqueeze(0)
    if a.left_window_size >= 0 or a.right_window_size >= 0:
        mask = both(padded(mask, sizes.T), in_window(i, a, sizes))
    return Problem(split_heads(i.Q, a.q_num_heads), K, V, mask, i.nonpad_kv_seqlen, sizes.P)


def allowed(p: Problem, is_causal: int) -> Maybe:
    """Which keys a query may see by causality and padding, bool [Sq, T] or [B, 1, 1 or Sq, T]; None: all."""
    j = torch.arange(p.K.shape[2], device=p.Q.device)
    lengths = None if p.lengths is None else p.lengths.view(-1, 1, 1, 1)
    if not is_causal:
        return None if lengths is None else j < lengths
    i = torch.arange(p.Q.shape[2], device=p.Q.device).unsqueeze(1)
    # The last query sits at the last valid key, so that causality implies the padding.
    return j <= i + (p.offset if lengths is None else lengths - p.Q.shape[2])


def in_window(i: Inputs, a: Attributes, sizes: Sizes) -> Tensor:
    """Which keys lie in a query's window, bool [Sq, T] or, where lengths differ, [B, 1, Sq, T]."""
    query = torch.arange(sizes.Sq, device=i.Q.device).unsqueeze(1)
    lengths = i.nonpad_kv_seqlen
    query = query + (sizes.P if lengths is None else lengths.view(-1, 1, 1, 1) - sizes.Sq)
    behind = query - torch.arange(sizes.T, device=i.Q.device)
    if a.left_window_size < 0:
        return behind >= -a.right_window_size
    seen = behind <= a.left_window_size
    return seen if a.right_window_size < 0 else seen.logical_and(behind >= -a.right_window_size)


def combined(p: Problem, is_causal: int) -> Maybe:
    """The caller's mask with causality and padding: bool, or added to the scores; None: nothing is masked."""
    return both(p.mask, allowed(p, is_causal))


def both(mask: Maybe, seen: Maybe) -> Maybe:
    """A mask of either kind, and a boolean one."""
    if mask is None or seen is None:
        return seen if mask is None else mask
    return mask.logical_and(seen) if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)


def padded(mask: Maybe, T: int) -> Maybe:
    """A mask that is shorter than the keys hides the rest, even if it has but one column (no broadcasting)."""
    if mask is None or equal(mask.shape[-1], T):
        return mask
    value = False if mask.dtype == torch.bool else -math.inf
    return F.pad(mask, (0, T - mask.shape[-1]), value=value)


class Scores(NamedTuple):
    """The stages of the spelled-out computation, each [B, Hq, Sq, T]; number n is qk_matmul_output_mode n."""

    raw: Tensor
    capped: Tensor
    masked: Tensor
    weights: Tensor


def scores(p: Problem, a: Attributes, dtype: torch.dtype | None = None) -> Scores:
    """All stages up to the softmax, rounded where ONNX rounds; the softmax in `dtype`."""
    scale = a.scale if a.scale is not None else 1.0 / math.sqrt(p.Q.shape[3])
    root = math.sqrt(abs(scale))
    raw = grouped_matmul(p.Q * math.copysign(root, scale), (p.K * root).mT)
    capped = torch.tanh(raw / a.softcap) * a.softcap if a.softcap else raw
    mask = combined(p._replace(mask=padded(p.mask, p.K.shape[2])), a.is_causal)
    if mask is None:
        return Scores(raw, capped, capped, torch.softmax(capped, -1, dtype=dtype).to(raw.dtype))
    masked = capped.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else capped + mask
    weights = torch.softmax(masked, -1, dtype=dtype).masked_fill(sees_nothing(mask), 0.0)
    return Scores(raw, capped, masked, weights.to(raw.dtype))


def sees_nothing(mask: Tensor) -> Tensor:
    """The rows [.., Sq, 1] that hide every key; told by the mask, for the scores can be NaN there."""
    return ~mask.any(-1, keepdim=True) if mask.dtype == torch.bool else (mask == -math.inf).all(-1, keepdim=True)


def grouped_matmul(x: Tensor, y: Tensor) -> Tensor:
    """x [B, Hq, M, K] @ y [B, Hkv, K, N]: a group's queries become rows of one product; y is not repeated."""
    dtype = x.dtype
    if dtype in (torch.float16, torch.bfloat16) and x.device.type == "cpu":
        # The same sums rounded to the same values, ten times as fast where the processor has no half products.
        x, y = x.float(), y.float()
    product = x @ y if equal(x.shape[1], y.shape[1]) else ungrouped(grouped(x, y.shape[1]) @ y, x)
    return product.to(dtype)


def grouped(x: Tensor, heads: int) -> Tensor:
    """[B, Hq, S, N] as [B, Hkv, G*S, N]."""
    return torch.unflatten(x, 1, (heads, x.shape[1] // heads)).flatten(2, 3)


def ungrouped(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `grouped`."""
    return x.reshape(like.shape[0], like.shape[1], like.shape[2], x.shape[3])


def sdpa_computes(p: Problem, a: Attributes) -> bool:
    """Is this what PyTorch's SDPA computes? Its softmax is at least float32, rows without keys give zero."""
    if a.softcap or not softmax_is_precise(a, p.Q.dtype):
        return False
    # With values of another size than the keys, PyTorch's CPU kernel would repeat the keys of every group.
    return equal(p.Q.shape[1], p.K.shape[1]) or equal(p.K.shape[3], p.V.shape[3])


def softmax_is_precise(a: Attributes, dtype: torch.dtype) -> bool:
    """Is a softmax in `dtype`, but in float32 at least, what softmax_precision asks for?"""
    wanted = softmax_dtype(a)
    return wanted in (None, dtype) or (wanted == torch.float32 and dtype in (torch.float16, torch.bfloat16))


def softmax_dtype(a: Attributes) -> torch.dtype | None:
    return None if a.softmax_precision is None else onnx_float(a.softmax_precision, "softmax_precision")


def sdpa(p: Problem, a: Attributes) -> Tensor:
    """Y [B, Hq, Sq, Dv] by PyTorch's SDPA: no more keys than needed, no mask where none is."""
    p = shortened(p)
    if p.Q.dtype == torch.float16 and p.Q.device.type == "cpu":
        # Three times as fast as the half kernel (measured), and Y is rounded once, as the official tests want it.
        return sdpa(widened(p, torch.float32), a).to(torch.float16)
    B, Hq, Sq, _ = p.Q.shape
    Hkv, T = p.K.shape[1], p.K.shape[2]
    if T == 0:
        return p.Q.new_zeros(B, Hq, Sq, p.V.shape[3])
    causal = a.is_causal and not (p.lengths is None and p.offset >= T - 1)
    if causal and p.mask is None and p.lengths is None and p.offset == 0:
        causal_y: Tensor = SDPA(p.Q, p.K, p.V, is_causal=True, scale=a.scale, enable_gqa=Hq != Hkv)
        return causal_y
    mask = combined(p, int(causal))
    if Sq > 1 or Hq == Hkv:
        return sdpa_call(p.Q, p, mask, a)
    # One query a head: the group as the query's rows makes better use of the kernel (twice as fast, measured).
    if mask is not None:
        mask = mask.expand(B, Hq, 1, T).reshape(B, Hkv, Hq // Hkv, T)
    return ungrouped(sdpa_call(grouped(p.Q, Hkv), p, mask, a), p.Q)


def sdpa_call(Q: Tensor, p: Problem, mask: Maybe, a: Attributes) -> Tensor:
    gqa = Q.shape[1] != p.K.shape[1]
    y: Tensor = SDPA(Q, p.K, p.V, mask, scale=a.scale, enable_gqa=gqa)
    # PyTorch's CPU kernels give 0 to a query that sees nothing; not every CUDA kernel promises it.
    return y if mask is None or y.device.type == "cpu" else y.masked_fill(sees_nothing(mask), 0.0)


def widened(p: Problem, dtype: torch.dtype) -> Problem:
    """The same in another floating-point type."""
    mask = p.mask if p.mask is None or p.mask.dtype == torch.bool else p.mask.to(dtype)
    return p._replace(Q=p.Q.to(dtype), K=p.K.to(dtype), V=p.V.to(dtype), mask=mask)


def shortened(p: Problem) -> Problem:
    """Without the keys that no query sees: beyond a short mask, or (where asking is cheap) beyond all lengths."""
    T = p.K.shape[2] if p.mask is None else min(p.K.shape[2], p.mask.shape[-1])
    lengths, offset = p.lengths, p.offset
    if lengths is not None and lengths.device.type == "cpu" and lengths.numel():
        low, high = (int(n) for n in lengths.aminmax())
        T = min(T, max(high, 0))
        if low == high:
            lengths, offset = None, high - p.Q.shape[2]
    if p.K.shape[2] == T:
        return p._replace(lengths=lengths, offset=offset)
    mask = None if p.mask is None else p.mask[..., :T]
    return Problem(p.Q, p.K[:, :, :T], p.V[:, :, :T], mask, lengths, offset)


def gradients(p: Problem, a: Attributes, grad_Y: Maybe, grad_qk: Maybe) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of Q, K, V [B, H, S, D] and of the mask's full form [B, Hq, Sq, T], by the textbook."""
    wide = torch.promote_types(p.Q.dtype, torch.float32)
    p = widened(p, wide)
    s = scores(p, a)
    mode = None if grad_qk is None else a.qk_matmul_output_mode
    heads = p.K.shape[1]

    g = torch.zeros_like(s.weights)
    grad_V = torch.zeros_like(p.V)
    if grad_Y is not None:
        y = grad_Y.to(wide)
        g = grouped_matmul(y, p.V.mT)
        grad_V = grouped(s.weights, heads).mT @ grouped(y, heads)
    if grad_qk is not None and mode == 3:
        g = g + grad_qk
    g = s.weights * (g - (g * s.weights).sum(-1, keepdim=True))
    if grad_qk is not None and mode == 2:
        g = g + grad_qk
    grad_mask = g
    if grad_qk is not None and mode == 1:
        g = g + grad_qk
    if a.softcap:
        g = g * (1.0 - (s.capped / a.softcap).square())
    if grad_qk is not None and mode == 0:
        g = g + grad_qk
    g = g * (a.scale if a.scale is not None else 1.0 / math.sqrt(p.Q.shape[3]))
    return grouped_matmul(g, p.K), grouped(g, heads).mT @ grouped(p.Q, heads), grad_V, grad_mask
