"""The translation of calls of scaled_dot_product_attention that no pattern took.

torch's own translation writes Attention only for 4-D operands. It hands the mask on as it is, though ONNX Runtime wants
[.., S, T] (`full` in `takes.json`); and it does not look whether the batches are equal, though PyTorch's call
broadcasts them.

    4-D, batches and heads that are known to fit    Attention, its mask expanded to [.., S, T]
    all else                                        written out: MatMul, mask, Softmax, MatMul, which broadcast

A row that sees no key gives 0 in both, as in PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.fx import Node

from fxfuse.graph.view import argument

SDPA = torch.ops.aten.scaled_dot_product_attention.default


def translates(nodes: Iterable[Node]) -> bool:
    """Are there such calls without dropout? Calls with dropout are left to torch."""
    calls = [n for n in nodes if n.target is SDPA]
    return bool(calls) and all(argument(n, "dropout_p") == 0.0 for n in calls)


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(scale · q·kᵀ + mask) · v of q [.., S, D], k [.., T, D], v [.., T, Dv]; a bool mask is True where a key is
    seen; `is_causal` counts from the first query and key on."""
    from onnxscript.onnx_opset import opset23

    op: Any = opset23
    if _fits(query, key, value, enable_gqa):
        attributes: dict[str, Any] = {} if scale is None else {"scale": scale}
        if is_causal:
            attributes["is_causal"] = 1
        mask = () if attn_mask is None else (_full(op, attn_mask, query, key),)
        return op.Attention(query, key, value, *mask, **attributes)[0]
    rank = len(key.shape)
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        key, value = (_repeated(op, t, query) for t in (key, value))
    # q and k each get the root of the factor, as in PyTorch's own kernel, so that the products stay small.
    size = query.shape[-1]
    half = math.sqrt(size**-0.5 if scale is None else abs(scale))
    factor = _number(op, half, query)
    sign = _number(op, -half if scale is not None and scale < 0 else half, query)
    transposed = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = op.MatMul(op.Mul(query, sign), op.Mul(transposed, factor))
    lowest = _number(op, -math.inf, query)
    if is_causal:
        lengths = op.Concat(op.Shape(query, start=-2, end=-1), op.Shape(key, start=-2, end=-1), axis=0)
        ones = op.Trilu(op.Expand(op.Constant(value_int=1), lengths), upper=0)
        scores = op.Where(op.Cast(ones, to=ir.DataType.BOOL), scores, lowest)
    if attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
        scores = op.Where(attn_mask, scores, lowest)
    elif attn_mask is not None:
        scores = op.Add(scores, op.CastLike(attn_mask, scores))
    weights = op.Softmax(scores, axis=-1)
    if attn_mask is not None:
        sees_nothing = op.Equal(op.ReduceMax(scores, op.Constant(value_ints=[-1])), lowest)
        weights = op.Where(sees_nothing, _number(op, 0.0, query), weights)
    return op.MatMul(weights, value)


def _number(op: Any, number: float, like: Any) -> Any:
    return op.CastLike(op.Constant(value=ir.tensor(np.array(number, np.float64))), like)


def _fits(query: Any, key: Any, value: Any, grouped: bool) -> bool:
    """Does Attention take these operands and compute the same? It does if it is certain that nothing broadcasts."""
    if not len(query.shape) == len(key.shape) == len(value.shape) == 4 or query.dtype == ir.DataType.DOUBLE:
        return False
    if not query.shape[0] == key.shape[0] == value.shape[0] or key.shape[1] != value.shape[1]:
        return False
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads == kv_heads:
        return True
    return grouped and isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads == 0


def _full(op: Any, mask: Any, query: Any, key: Any) -> Any:
    """The mask with its last two dims [S, T]."""
    wanted = query.shape[-2], key.shape[-2]
    if len(mask.shape) >= 2 and tuple(mask.shape[-2:]) == wanted:
        return mask
    lengths = op.Concat(op.Shape(query, start=-2, end=-1), op.Shape(key, start=-2, end=-1), axis=0)
    return op.Expand(mask, lengths)


def _repeated(op: Any, t: Any, query: Any) -> Any:
    """Each key head repeated for all the query heads that read it."""
    heads, own, rank = query.shape[-3], t.shape[-3], len(t.shape)
    if not (isinstance(heads, int) and isinstance(own, int) and heads % own == 0):
        raise NotImplementedError(f"{heads} query heads over {own} key heads")
    # [.., H, T, D] as [.., H, 1, T, D], expanded, as [.., H·n, T, D]
    apart = op.Unsqueeze(t, op.Constant(value_ints=[rank - 2]))
    wide = op.Expand(apart, op.Constant(value_ints=[heads // own, 1, 1]))
    shape = op.Concat(
        *([op.Shape(t, end=-3)] if rank > 3 else []), op.Constant(value_ints=[heads]), op.Shape(t, start=-2), axis=0
    )
    return op.Reshape(wide, shape)
