"""fxfuse::rotary_embedding, which is RotaryEmbedding of ONNX (opset 23).

https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html

    Y1 = X1·cos - X2·sin        X1, X2: the halves of the first rotary_embedding_dim elements of every head,
    Y2 = X1·sin + X2·cos        or, interleaved, its even and its odd elements; the rest of X passes through

X             [B, H, S, D] or, with num_heads, [B, S, H*D]; any floating-point type and layout
cos, sin      [B, S, R/2] or, with position_ids, [positions, R/2]; X's type; R is rotary_embedding_dim or, if 0, D
position_ids  [B, S], int64
Y             X's shape and type; three dims contiguous, four in memory as [B, S, H, D]

Raises FxfuseError, naming the argument: shapes or types that do not fit. As in ONNX, nothing broadcasts over the batch.
Float64 is for proofs and gradients: ONNX's operator has no such type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxfuse.ops.arguments import differ, exceeds, refuse, show
from fxfuse.ops.outputs import one_node
from fxfuse.ops.registry import define_backward, define_op, has_kernel

SCHEMA = (
    "(Tensor X, Tensor cos_cache, Tensor sin_cache, Tensor? position_ids=None, *, "
    "int interleaved=0, int num_heads=0, int rotary_embedding_dim=0) -> Tensor"
)
DEFAULTS = {"interleaved": 0, "num_heads": 0, "rotary_embedding_dim": 0}


def check(
    X: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    interleaved: int,
    num_heads: int,
    rotary_dim: int,
) -> int:
    """The number of rotated elements of a head; raises FxfuseError on arguments that do not fit."""
    if not X.is_floating_point():
        refuse(f"X must be floating point, it is {X.dtype}", "X")
    if X.dim() not in (3, 4):
        refuse(f"X must be [B, S, H*D] or [B, H, S, D], it is {show(X)}", "X")
    if interleaved not in (0, 1):
        refuse(f"interleaved must be 0 or 1, it is {interleaved}", "interleaved")
    if X.dim() == 3:
        if num_heads <= 0:
            refuse(f"X {show(X)} has three dims: its number of heads must be given", "num_heads")
        fits = not differ(X.shape[2] % num_heads, 0)
        if not fits:
            refuse(f"X {show(X)} does not divide into {num_heads} heads", "num_heads")
    size = X.shape[2] // num_heads if X.dim() == 3 else X.shape[3]
    D = rotary_dim or size
    if differ(D % 2, 0):
        refuse(f"the rotated part of a head must be even, it is {D}", "rotary_embedding_dim")
    fits = rotary_dim >= 0 and not exceeds(rotary_dim, size)
    if not fits:
        refuse(f"rotary_embedding_dim {rotary_dim} does not fit heads of {size}", "rotary_embedding_dim")
    B, S = X.shape[0], X.shape[-2]
    for name, cache in (("cos_cache", cos), ("sin_cache", sin)):
        if cache.dtype != X.dtype:
            refuse(f"{name} is {cache.dtype}, X is {X.dtype}: they must be the same", name)
        if position_ids is None:
            fits = cache.dim() == 3 and not (differ(cache.shape[0], B) or differ(cache.shape[1], S))
            hint = "expand it to the batch, or pass position_ids"
            if not fits:
                refuse(f"{name} must be [{B}, {S}, {D // 2}] without position_ids, it is {show(cache)}", name, hint)
        else:
            if cache.dim() != 2:
                refuse(f"{name} must be [positions, {D // 2}], it is {show(cache)}", name)
        if differ(cache.shape[-1], D // 2):
            refuse(f"{name} {show(cache)} must end in {D // 2}", name)
    if not (cos.dim() == 3 or not differ(cos.shape[0], sin.shape[0])):
        refuse("cos and sin differ in length", "sin_cache")
    if position_ids is not None:
        if position_ids.dtype != torch.int64:
            refuse("position_ids must be int64", "position_ids")
        fits = position_ids.dim() == 2 and not (differ(position_ids.shape[0], B) or differ(position_ids.shape[1], S))
        if not fits:
            refuse(f"position_ids must be [{B}, {S}], it is {show(position_ids)}", "position_ids")
    return D


def halves(x_BSHD: Tensor, interleaved: int, D: int) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x_BSHD[..., 0:D:2], x_BSHD[..., 1:D:2]
    return x_BSHD[..., : D // 2], x_BSHD[..., D // 2 : D]


def heads_last(X: Tensor, num_heads: int) -> Tensor:
    """X as [B, S, H, D], a view."""
    return X.transpose(1, 2) if X.dim() == 4 else torch.unflatten(X, 2, (num_heads, X.shape[2] // num_heads))


def angles(cache: Tensor, position_ids: Tensor | None) -> Tensor:
    """The cache at every position, as [B, S, 1, D/2]."""
    return (cache if position_ids is None else cache[position_ids]).unsqueeze(2)


def output(X: Tensor) -> Tensor:
    """Y to be: four dims lie in memory as [B, S, H, D], as those of a model's transposed projections do."""
    if X.dim() == 3:
        return torch.empty(X.shape, dtype=X.dtype, device=X.device)
    return torch.empty_permuted(X.shape, (0, 2, 1, 3), dtype=X.dtype, device=X.device)


def composite(
    X: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    D = check(X, cos_cache, sin_cache, position_ids, interleaved, num_heads, rotary_embedding_dim)
    cos, sin = angles(cos_cache, position_ids), angles(sin_cache, position_ids)
    out = output(X)
    x, y = heads_last(X, num_heads), heads_last(out, num_heads)
    (x1, x2), (y1, y2) = halves(x, interleaved, D), halves(y, interleaved, D)
    # Each product is rounded before the sum, as the specification's Mul, Sub and Add do; addcmul would not.
    torch.mul(x[..., :D], cos.repeat_interleave(2, -1) if interleaved else torch.cat((cos, cos), -1), out=y[..., :D])
    y1.sub_(x2 * sin)
    y2.add_(x1 * sin)
    y[..., D:] = x[..., D:]
    return out


def fake(
    X: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    check(X, cos_cache, sin_cache, position_ids, interleaved, num_heads, rotary_embedding_dim)
    return output(X)


def decomposition(
    X: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Y of the operator, in ATen operators only."""
    D = check(X, cos_cache, sin_cache, position_ids, interleaved, num_heads, rotary_embedding_dim)
    cos, sin = angles(cos_cache, position_ids), angles(sin_cache, position_ids)
    x = heads_last(X, num_heads)
    x1, x2 = halves(x, interleaved, D)
    pair = (x1 * cos - x2 * sin, x1 * sin + x2 * cos)
    y = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    if rotary_embedding_dim:
        y = torch.cat((y, x[..., D:]), -1)
    y = y.contiguous()
    return y.flatten(2) if X.dim() == 3 else y.transpose(1, 2)


def setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.attributes = keyword_only_inputs


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    X, cos_cache, sin_cache, position_ids = ctx.saved_tensors
    attributes = ctx.attributes
    grad_X = grad_cos = grad_sin = None
    if ctx.needs_input_grad[0]:
        rotate_back = torch.ops.fxfuse.rotary_embedding_backward if has_kernel(grad) else composite_backward
        grad_X = rotate_back(grad, cos_cache, sin_cache, position_ids, **attributes)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        D = attributes["rotary_embedding_dim"] or cos_cache.shape[-1] * 2
        x1, x2 = halves(heads_last(X, attributes["num_heads"]), attributes["interleaved"], D)
        g1, g2 = halves(heads_last(grad, attributes["num_heads"]), attributes["interleaved"], D)
        grad_cos, grad_sin = (g1 * x1 + g2 * x2).sum(2), (g2 * x1 - g1 * x2).sum(2)
        if position_ids is not None:
            grad_cos = torch.zeros_like(cos_cache).index_put((position_ids,), grad_cos, accumulate=True)
            grad_sin = torch.zeros_like(sin_cache).index_put((position_ids,), grad_sin, accumulate=True)
    return grad_X, grad_cos, grad_sin, None


def composite_backward(
    grad: Tensor, cos_cache: Tensor, sin_cache: Tensor, position_ids: Tensor | None = None, **attributes: int
) -> Tensor:
    """The gradient of X: a rotation's transpose is the rotation by the opposite angle."""
    grad_X: Tensor = torch.ops.fxfuse.rotary_embedding(grad, cos_cache, -sin_cache, position_ids, **attributes)
    return grad_X


def fake_backward(grad: Tensor, cos_cache: Tensor, *rest: Any, **attributes: int) -> Tensor:
    return output(grad)


def make_translation(opset: int) -> Any:
    from onnxscript.onnx_opset import opset23 as op

    def rotary_embedding(
        X: Any,
        cos_cache: Any,
        sin_cache: Any,
        position_ids: Any = None,
        *,
        interleaved: int = 0,
        num_heads: int = 0,
        rotary_embedding_dim: int = 0,
    ) -> Any:
        attributes = {
            "interleaved": interleaved,
            "num_heads": num_heads,
            "rotary_embedding_dim": rotary_embedding_dim,
        }
        return one_node(op.RotaryEmbedding, (X, cos_cache, sin_cache, position_ids), attributes, DEFAULTS)

    return rotary_embedding


define_op(
    "rotary_embedding",
    SCHEMA,
    composite=composite,
    fake=fake,
    setup_context=setup_context,
    backward=backward,
    decomposition=decomposition,
    onnx_name="RotaryEmbedding",
    since_opset=23,
    make_translation=make_translation,
    analytic=True,
    takes={
        "types": ["float16", "bfloat16", "float32"],
        "alike": ["X", "cos_cache", "sin_cache"],
        "onnxruntime_cpu": ["float16", "float32"],
    },
    kernels=f"{__name__}.kernels",
)

define_backward(
    "rotary_embedding_backward",
    "(Tensor grad, Tensor cos_cache, Tensor sin_cache, Tensor? position_ids, *, "
    "int interleaved=0, int num_heads=0, int rotary_embedding_dim=0) -> Tensor",
    composite=composite_backward,
    fake=fake_backward,
    kernels=f"{__name__}.kernels",
)
