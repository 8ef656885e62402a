"""When PyTorch's SDPA has a fused CUDA kernel for a call, and when it would store the Sq × T scores."""

from __future__ import annotations

import torch
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

from fxfuse.ops.attention.arguments import Attributes
from fxfuse.ops.attention.math import Problem, grouped, sdpa_computes


def has_fused_kernel(p: Problem, a: Attributes, T: int) -> bool:
    """Does `math.sdpa` end in FlashAttention or the memory-efficient kernel?

    Soft-caps are none of SDPA's; of ragged lengths it would read every padded key.

    Args:
        p: the call. Its K and V may be without the past: their length does not count here.
        a: its attributes.
        T: how many keys there are in all.
    """
    if not p.Q.is_cuda or p.lengths is not None or T == 0 or not sdpa_computes(p, a):
        return False
    (B, Hq, Sq, _), Hkv = p.Q.shape, p.K.shape[1]
    causal = bool(a.is_causal) and p.offset < T - 1
    plain = causal and p.mask is None and p.offset == 0
    mask = p.mask
    if causal and not plain and mask is None:
        mask = torch.empty(1, dtype=torch.bool, device=p.Q.device).expand(B, Hq, Sq, T)
    # As `sdpa` calls it: the queries of a group in place of its one query.
    Q, gqa = (grouped(p.Q, Hkv), False) if Sq == 1 else (p.Q, Hq != Hkv)
    params = SDPAParams(Q, p.K, p.V, mask, 0.0, plain, gqa)
    return can_use_flash_attention(params) or can_use_efficient_attention(params)
