"""fxfuse::rms_norm, which is RMSNormalization of ONNX (opset 23).

https://onnx.ai/onnx/operators/onnx__RMSNormalization.html

    Y = cast(X / sqrt(mean(X², axes=axis..) + epsilon), X.dtype) · scale      the quotient in `stash_type`

X           [..., d(axis), ..., d(-1)], any floating-point type and layout
scale       any floating-point type, broadcasts to X
stash_type  ONNX's number of a type: 1 float32, 10 float16, 11 float64, 16 bfloat16
Y           X's shape, scale's type, contiguous

Raises FxfuseError, naming the argument: an axis out of range, a scale that does not broadcast, an unknown type.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.ops.arguments import differ, onnx_float, refuse, show
from fxfuse.ops.outputs import as_laid_out, one_node
from fxfuse.ops.registry import define_backward, define_op, has_kernel

SCHEMA = "(Tensor X, Tensor scale, *, int axis=-1, float epsilon=1e-05, int stash_type=1) -> Tensor"
DEFAULTS = {"axis": -1, "epsilon": 1e-05, "stash_type": 1}


def check(X: Tensor, scale: Tensor, axis: int) -> int:
    """The first normalised dimension, counted from the front; raises FxfuseError on arguments that do not fit."""
    if not X.is_floating_point():
        refuse(f"X must be floating point, it is {X.dtype}", "X")
    if not scale.is_floating_point():
        refuse(f"scale must be floating point, it is {scale.dtype}", "scale")
    if not (-X.dim() <= axis < X.dim()):
        refuse(f"axis {axis} is out of range for X of shape {show(X)}", "axis")
    fits = scale.dim() <= X.dim() and not any(
        differ(s, x) and differ(s, 1) for s, x in zip(reversed(scale.shape), reversed(X.shape), strict=False)
    )
    if not fits:
        refuse(f"scale {show(scale)} does not broadcast to X {show(X)}", "scale")
    return axis % X.dim()


def normalized(X: Tensor, axis: int, epsilon: float, stash: torch.dtype) -> Tensor:
    """X over its root mean square from dimension `axis` on, computed in `stash`, in X's dtype."""
    return F.rms_norm(X.to(stash), X.shape[axis:], None, epsilon).to(X.dtype)


def composite(X: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-05, stash_type: int = 1) -> Tensor:
    axis = check(X, scale, axis)
    stash = onnx_float(stash_type, "stash_type")
    if X.dtype != stash and torch.promote_types(X.dtype, stash) == stash:
        # Reducing in the wider type, and promoting in the product, spares a copy of X in it.
        norm = torch.linalg.vector_norm(X, dim=list(range(axis, X.dim())), keepdim=True, dtype=stash)
        count = max(X.shape[axis:].numel(), 1)
        n = (X * norm.square_().div_(count).add_(epsilon).rsqrt_()).to(X.dtype)
    else:
        n = normalized(X, axis, epsilon, stash)
    out = torch.empty(X.shape, dtype=scale.dtype, device=X.device)
    return torch.mul(n, scale, out=out)


def fake(X: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-05, stash_type: int = 1) -> Tensor:
    check(X, scale, axis)
    onnx_float(stash_type, "stash_type")
    return torch.empty(X.shape, dtype=scale.dtype, device=X.device)


def decomposition(X: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-05, stash_type: int = 1) -> Tensor:
    """Y of the operator, in ATen operators only."""
    axis = check(X, scale, axis)
    y = normalized(X, axis, epsilon, onnx_float(stash_type, "stash_type")) * scale
    return y.to(scale.dtype).contiguous()


def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.attributes = keyword_only_inputs


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    X, scale = ctx.saved_tensors
    need = ctx.needs_input_grad
    if has_kernel(grad):
        grad_X, grad_scale = torch.ops.fxfuse.rms_norm_backward(grad, X, scale, **ctx.attributes)
        return grad_X if need[0] else None, grad_scale if need[1] else None
    return gradients(grad, X, scale, need, **ctx.attributes)


def gradients(
    grad: Tensor, X: Tensor, scale: Tensor, need: tuple[bool, ...], axis: int, epsilon: float, stash_type: int
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of X and scale that are needed, by the textbook."""
    axis %= X.dim()
    stash = onnx_float(stash_type, "stash_type")
    dims = list(range(axis, X.dim()))
    x = X.to(stash)
    r = torch.rsqrt(x.square().mean(dims, keepdim=True) + epsilon)
    n = x * r
    grad_X = grad_scale = None
    if need[0]:
        g = grad.to(stash) * scale.to(stash)
        grad_X = (r * (g - n * (g * n).mean(dims, keepdim=True))).to(X.dtype)
    if need[1]:
        grad_scale = (grad.to(stash) * n.to(X.dtype)).sum_to_size(scale.shape).to(scale.dtype)
    return grad_X, grad_scale


def composite_backward(
    grad: Tensor, X: Tensor, scale: Tensor, *, axis: int, epsilon: float, stash_type: int
) -> tuple[Tensor, Tensor]:
    """The gradients of X and scale, contiguous."""
    grad_X, grad_scale = gradients(grad, X, scale, (True, True), axis, epsilon, stash_type)
    assert grad_X is not None and grad_scale is not None
    return as_laid_out(grad_X), as_laid_out(grad_scale)


def fake_backward(grad: Tensor, X: Tensor, scale: Tensor, **attributes: Any) -> tuple[Tensor, Tensor]:
    return X.new_empty(X.shape), scale.new_empty(scale.shape)


def make_translation(opset: int) -> Any:
    from onnxscript.onnx_opset import opset23 as op

    def rms_norm(X: Any, scale: Any, *, axis: int = -1, epsilon: float = 1e-05, stash_type: int = 1) -> Any:
        attributes = {"axis": axis, "epsilon": epsilon, "stash_type": stash_type}
        return one_node(op.RMSNormalization, (X, scale), attributes, DEFAULTS)

    return rms_norm


define_op(
    "rms_norm",
    SCHEMA,
    composite=composite,
    fake=fake,
    setup_context=setup_context,
    backward=backward,
    decomposition=decomposition,
    onnx_name="RMSNormalization",
    since_opset=23,
    make_translation=make_translation,
    analytic=True,
    takes={
        "types": ["float16", "bfloat16", "float32", "float64"],
        "alike": ["X", "scale"],
        "onnxruntime_cpu": ["float16", "float32", "float64"],
    },
    kernels=f"{__name__}.kernels",
    accumulates=True,
)

define_backward(
    "rms_norm_backward",
    "(Tensor grad, Tensor X, Tensor scale, *, int axis, float epsilon, int stash_type) -> (Tensor, Tensor)",
    composite=composite_backward,
    fake=fake_backward,
    kernels=f"{__name__}.kernels",
)
