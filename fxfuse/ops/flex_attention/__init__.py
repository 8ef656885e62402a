"""fxfuse::flex_scores and fxfuse::flex_output: with what stands between them they are FlexAttention of ai.onnx.preview.

https://onnx.ai/onnx/operators/onnx_aionnxpreview_FlexAttention.html

    flex_scores   scores = Q·Kᵀ·scale [B, Hq, S, T], and where they stand: b [B, 1, 1, 1], h [1, Hq, 1, 1],
                  q [1, 1, S, 1] and kv [1, 1, 1, T], int64
    flex_output   Y = softmax(scores)·V; a row that is -inf throughout gives 0

An export graph has no node that holds a function. So the operator is two: what is computed on the way from the
outputs of the first to the second is its `score_mod`, which `join` puts where ONNX has it; what comes from elsewhere is
captured.

Q [B, Hq, S, D], K [B, Hkv, T, D], V [B, Hkv, T, Dv], of one floating-point type; Hkv divides Hq. Scores are float32,
or float64 where Q is; Y [B, Hq, S, Dv] is of V's type and in memory [B, S, Hq, Dv].

Raises FxfuseError, naming the argument: shapes, types or a scale that do not fit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxfuse.ops.arguments import differ, refuse, show
from fxfuse.ops.attention.math import grouped, grouped_matmul
from fxfuse.ops.flex_attention.halves import OUTPUT, SCORES, half
from fxfuse.ops.outputs import as_laid_out
from fxfuse.ops.registry import JOINS, define_op

if TYPE_CHECKING:
    import onnx_ir as ir

ScoresAndPositions = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def check_scores(Q: Tensor, K: Tensor, scale: float) -> None:
    if not Q.is_floating_point() or Q.dtype != K.dtype:
        refuse(f"Q and K must be of one floating-point type, they are {Q.dtype} and {K.dtype}", "K")
    if Q.dim() != 4 or K.dim() != 4:
        refuse(f"Q and K must be [B, Hq, S, D] and [B, Hkv, T, D], they are {show(Q)} and {show(K)}", "Q")
    if differ(Q.shape[0], K.shape[0]) or differ(Q.shape[3], K.shape[3]):
        refuse(f"Q {show(Q)} and K {show(K)} differ in batch or head size", "K")
    if differ(Q.shape[1] % K.shape[1], 0):
        refuse(f"{Q.shape[1]} query heads do not divide into {K.shape[1]} key heads", "K")
    if not (math.isfinite(scale) and scale >= 0):
        refuse(f"scale must be a number from 0 on (ONNX takes its root), it is {scale}", "scale")


def scores(Q: Tensor, K: Tensor, *, scale: float) -> ScoresAndPositions:
    check_scores(Q, K, scale)
    wide = torch.promote_types(Q.dtype, torch.float32)
    raw = grouped_matmul(Q.to(wide), K.to(wide).mT) * scale
    b, h, q, kv = (as_laid_out(p) for p in positions(raw))
    return as_laid_out(raw), b, h, q, kv


def positions(raw: Tensor) -> list[Tensor]:
    """b, h, q and kv of scores [B, Hq, S, T]."""
    return [
        torch.arange(size, device=raw.device).view([-1 if axis == d else 1 for d in range(4)])
        for axis, size in enumerate(raw.shape)
    ]


def fake_scores(Q: Tensor, K: Tensor, *, scale: float) -> ScoresAndPositions:
    check_scores(Q, K, scale)
    raw = Q.new_empty((*Q.shape[:3], K.shape[2]), dtype=torch.promote_types(Q.dtype, torch.float32))
    b, h, q, kv = (
        Q.new_empty([size if axis == d else 1 for d in range(4)], dtype=torch.int64)
        for axis, size in enumerate(raw.shape)
    )
    return raw, b, h, q, kv


def decomposed_scores(Q: Tensor, K: Tensor, *, scale: float) -> ScoresAndPositions:
    check_scores(Q, K, scale)
    wide = torch.promote_types(Q.dtype, torch.float32)
    raw = grouped_matmul(Q.to(wide), K.to(wide).mT) * scale
    b, h, q, kv = positions(raw)
    return raw, b, h, q, kv


def keep_scores(ctx: Any, inputs: tuple[Tensor, Tensor], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.scale = keyword_only_inputs["scale"]
    ctx.mark_non_differentiable(*output[1:])


def backward_scores(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    Q, K = ctx.saved_tensors
    grad, q, k = grad * ctx.scale, Q.to(grad.dtype), K.to(grad.dtype)
    grad_K = grouped(grad, K.shape[1]).mT @ grouped(q, K.shape[1])
    return grouped_matmul(grad, k).to(Q.dtype), grad_K.to(K.dtype)


def check_output(scores: Tensor, V: Tensor) -> None:
    if scores.dim() != 4 or V.dim() != 4:
        refuse(f"scores and V must be [B, Hq, S, T] and [B, Hkv, T, Dv], they are {show(scores)} and {show(V)}", "V")
    if not V.is_floating_point() or scores.dtype != torch.promote_types(V.dtype, torch.float32):
        refuse(f"scores of {V.dtype} values must be float32 or as wide, they are {scores.dtype}", "scores")
    if differ(scores.shape[0], V.shape[0]) or differ(scores.shape[3], V.shape[2]):
        refuse(f"scores {show(scores)} and V {show(V)} differ in batch or length", "V")
    if differ(scores.shape[1] % V.shape[1], 0):
        refuse(f"{scores.shape[1]} query heads do not divide into {V.shape[1]} value heads", "V")


def weights(scores: Tensor) -> Tensor:
    """A softmax that gives 0 to a row which sees nothing."""
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores, -1).masked_fill(nothing, 0.0)


def output(scores: Tensor, V: Tensor) -> Tensor:
    check_output(scores, V)
    y = grouped_matmul(weights(scores), V.to(scores.dtype)).to(V.dtype)
    return as_laid_out(y, (0, 2, 1, 3))


def fake_output(scores: Tensor, V: Tensor) -> Tensor:
    check_output(scores, V)
    B, Hq, S, _ = scores.shape
    return V.new_empty((B, S, Hq, V.shape[3])).transpose(1, 2)


def decomposed_output(scores: Tensor, V: Tensor) -> Tensor:
    check_output(scores, V)
    y = grouped_matmul(weights(scores), V.to(scores.dtype)).to(V.dtype)
    return y.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def keep_output(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def backward_output(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    scores, V = ctx.saved_tensors
    p, grad, heads = weights(scores), grad.to(scores.dtype), V.shape[1]
    through = grouped_matmul(grad, V.to(scores.dtype).mT)
    grad_scores = p * (through - (through * p).sum(-1, keepdim=True))
    return grad_scores, (grouped(p, heads).mT @ grouped(grad, heads)).to(V.dtype)


def join(model: ir.Model) -> int:
    """See `fxfuse.ops.flex_attention.join`, which is imported when there is a model to look through."""
    from fxfuse.ops.flex_attention.join import join_flex_attention

    return join_flex_attention(model)


define_op(
    "flex_scores",
    "(Tensor Q, Tensor K, *, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    composite=scores,
    fake=fake_scores,
    setup_context=keep_scores,
    backward=backward_scores,
    decomposition=decomposed_scores,
    onnx_name="FlexAttention",
    since_opset=23,
    make_translation=half(SCORES, ("Q", "K"), ("scores", "b", "h", "q", "kv"), ("scale",)),
    part=True,
)
define_op(
    "flex_output",
    "(Tensor scores, Tensor V) -> Tensor",
    composite=output,
    fake=fake_output,
    setup_context=keep_output,
    backward=backward_output,
    decomposition=decomposed_output,
    onnx_name="FlexAttention",
    since_opset=23,
    make_translation=half(OUTPUT, ("scores", "V"), ("Y",)),
    part=True,
)
JOINS.append(join)
