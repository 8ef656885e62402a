"""How far two right computations of one attention may lie apart, element by element: intervals of every stage."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.ops.onnx_definition import smallest, ulp

F64 = torch.float64


class Bounds(NamedTuple):
    """Of Y, and of qk_matmul_output in its four modes."""

    y: Tensor
    qk: tuple[Tensor, Tensor, Tensor, Tensor]


def bounds(args: tuple[Tensor | None, ...], attributes: dict[str, Any]) -> Bounds:
    """What rounding in the inputs' type, or in a wider one, may do to each element.

    A score moves by the rounding of its own sum of products; the mask is added to both ends of that interval and the
    sums are rounded as the type does, so that a score that is lost against its mask is lost in the bound; the
    weights follow from the worst scores of a row.
    """
    Q, K, V, mask, past_key, past_value, lengths = (*args, *[None] * 7)[:7]
    assert Q is not None and K is not None and V is not None
    flat, dtype = Q.dim() == 3, Q.dtype
    eps = ulp(dtype)
    q, k, v = (x.double() for x in (Q, K, V))
    if flat:
        heads = attributes["q_num_heads"], attributes["kv_num_heads"], attributes["kv_num_heads"]
        q, k, v = (x.unflatten(2, (n, -1)).transpose(1, 2) for x, n in zip((q, k, v), heads, strict=True))
    P = 0
    if past_key is not None and past_value is not None:
        P = past_key.shape[2]
        k, v = torch.cat((past_key.double(), k), 2), torch.cat((past_value.double(), v), 2)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    (_, _, Sq, D), T = q.shape, k.shape[2]

    scale = attributes.get("scale", 1 / math.sqrt(D))
    raw = q @ k.mT * scale
    grid = smallest(dtype) * (q.abs().sum(-1, keepdim=True) + k.abs().sum(-1).unsqueeze(-2) + D)
    spread = (D + 8) * eps * (q.abs() @ k.abs().mT * abs(scale)) + grid
    low, high = raw - spread, raw + spread
    raw_bound = high - low
    if cap := attributes.get("softcap", 0.0):
        low, high = (cap * torch.tanh(x / cap) for x in (low, high))
        low, high = low - 6 * eps * low.abs(), high + 6 * eps * high.abs()
    capped_bound = high - low

    seen, added = visible(mask, lengths, Sq, T, P, attributes.get("is_causal", 0))
    kinds = {dtype, *({torch.float32} if dtype == torch.float16 else ())}
    low = torch.stack([(low + added).to(kind).double() for kind in kinds]).amin(0)
    high = torch.stack([(high + added).to(kind).double() for kind in kinds]).amax(0)
    masked_bound = (high - low).masked_fill(~seen, 0.0)
    if (to := attributes.get("softmax_precision")) is not None:
        kind = {1: torch.float32, 10: torch.float16, 11: F64}[to]
        low, high = low.to(kind).double(), high.to(kind).double()
        eps = max(eps, ulp(kind))
    low, high = low.masked_fill(~seen, -math.inf), high.masked_fill(~seen, -math.inf)

    least, most = weights(low, high, eps, smallest(dtype))
    p_bound = most - least
    y = p_bound @ v.abs() + (T + 8) * eps * (most @ v.abs()) + smallest(dtype) * T
    return Bounds(y.transpose(1, 2).flatten(2) if flat else y, (raw_bound, capped_bound, masked_bound, p_bound))


def visible(
    mask: Tensor | None, lengths: Tensor | None, Sq: int, T: int, P: int, is_causal: int
) -> tuple[Tensor, Tensor]:
    """Which keys a query sees, and what is added to their scores."""
    i, j = torch.arange(Sq).unsqueeze(1), torch.arange(T)
    n = None if lengths is None else lengths.view(-1, 1, 1, 1)
    seen = torch.ones(Sq, T, dtype=torch.bool) if n is None else j < n
    if is_causal:
        seen = seen & (j <= i + (P if n is None else n - Sq))
    if mask is None:
        return seen, torch.zeros((), dtype=F64)
    fill = False if mask.dtype == torch.bool else -math.inf
    mask = torch.nn.functional.pad(mask, (0, T - mask.shape[-1]), value=fill)
    if mask.dtype == torch.bool:
        return seen & mask, torch.zeros((), dtype=F64)
    return seen & (mask != -math.inf), mask.double().masked_fill(mask == -math.inf, 0.0)


def weights(low: Tensor, high: Tensor, eps: float, tiny: float) -> tuple[Tensor, Tensor]:
    """The least and the most that softmax can give to each key of a row; 0 where a row sees none."""
    other = torch.full((low.shape[-1],) * 2, 0.0, dtype=F64).fill_diagonal_(-math.inf)

    def share(score: Tensor, others: Tensor) -> Tensor:
        rest = (others.unsqueeze(-2) + other).logsumexp(-1)
        return torch.sigmoid(score - rest).masked_fill(score == -math.inf, 0.0)

    down, up = share(low, high), share(high, low)
    # exp of PyTorch's CPU kernel has 20 bits.
    slack = 32 * eps
    return (down * (1 - slack) - tiny).clamp(min=0.0), up * (1 + slack) + tiny * (up > 0)
