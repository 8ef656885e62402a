"""fxfuse::layer_norm, which is LayerNormalization of ONNX (opset 17).

https://onnx.ai/onnx/operators/onnx__LayerNormalization.html

    D = X - mean(X, axes=axis..)
    Y = cast(D / sqrt(mean(D², axes=axis..) + epsilon), X.dtype) · Scale + B      the quotient in `stash_type`

X           [..., d(axis), ..., d(-1)], any floating-point type and layout
Scale, B    [d(axis), ..., d(-1)], X's type; B may be left out
stash_type  ONNX's number of a type: 1 float32, 16 bfloat16; 11, float64, is none of ONNX's here and is what keeps
            float64 from being rounded: the export writes the operator out then
Y           X's shape and type, contiguous

ONNX's other outputs, mean and 1/root, are none of ours. Raises FxfuseError, naming the argument: an axis out of range,
a Scale or B of another shape or type than X's from `axis` on, an unknown type.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.ops.arguments import differ, onnx_float, refuse, show
from fxfuse.ops.outputs import one_node
from fxfuse.ops.registry import define_op

SCHEMA = "(Tensor X, Tensor Scale, Tensor? B=None, *, int axis=-1, float epsilon=1e-05, int stash_type=1) -> Tensor"
DEFAULTS = {"axis": -1, "epsilon": 1e-05, "stash_type": 1}


def check(X: Tensor, Scale: Tensor, B: Tensor | None, axis: int) -> int:
    """The first normalised dimension, counted from the front; raises FxfuseError on arguments that do not fit."""
    if not X.is_floating_point():
        refuse(f"X must be floating point, it is {X.dtype}", "X")
    if not (-X.dim() <= axis < X.dim()):
        refuse(f"axis {axis} is out of range for X of shape {show(X)}", "axis")
    axis %= X.dim()
    for name, tensor in (("Scale", Scale), ("B", B)):
        if tensor is None:
            continue
        if tensor.dtype != X.dtype:
            refuse(f"{name} is {tensor.dtype}, X is {X.dtype}: they must be the same", name)
        if tensor.dim() != X.dim() - axis or any(map(differ, tensor.shape, X.shape[axis:])):
            refuse(f"{name} {show(tensor)} must have the shape of X {show(X)} from dimension {axis} on", name)
    return axis


def normalized(X: Tensor, axis: int, epsilon: float, stash: torch.dtype) -> Tensor:
    """X less its mean over its standard deviation from dimension `axis` on, computed in `stash`, in X's dtype."""
    return F.layer_norm(X.to(stash), X.shape[axis:], None, None, epsilon).to(X.dtype)


def composite(
    X: Tensor, Scale: Tensor, B: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-05, stash_type: int = 1
) -> Tensor:
    axis = check(X, Scale, B, axis)
    n = normalized(X, axis, epsilon, onnx_float(stash_type, "stash_type"))
    out = torch.mul(n, Scale, out=torch.empty(X.shape, dtype=X.dtype, device=X.device))
    return out if B is None else out.add_(B)


def fake(
    X: Tensor, Scale: Tensor, B: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-05, stash_type: int = 1
) -> Tensor:
    check(X, Scale, B, axis)
    onnx_float(stash_type, "stash_type")
    return torch.empty(X.shape, dtype=X.dtype, device=X.device)


def decomposition(
    X: Tensor, Scale: Tensor, B: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-05, stash_type: int = 1
) -> Tensor:
    """Y of the operator, in ATen operators only."""
    axis = check(X, Scale, B, axis)
    y = normalized(X, axis, epsilon, onnx_float(stash_type, "stash_type")) * Scale
    return (y if B is None else y + B).contiguous()


def setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    X, Scale, _ = inputs
    ctx.save_for_backward(X, Scale)
    ctx.attributes = keyword_only_inputs


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of X, Scale and B that are needed, by the textbook."""
    X, Scale = ctx.saved_tensors
    axis = ctx.attributes["axis"] % X.dim()
    stash = onnx_float(ctx.attributes["stash_type"], "stash_type")
    dims = list(range(axis, X.dim()))
    need = (*ctx.needs_input_grad, False)
    d = X.to(stash) - X.to(stash).mean(dims, keepdim=True)
    r = torch.rsqrt(d.square().mean(dims, keepdim=True) + ctx.attributes["epsilon"])
    n = d * r
    grad_X = grad_Scale = grad_B = None
    if need[0]:
        g = grad.to(stash) * Scale.to(stash)
        grad_X = (r * (g - g.mean(dims, keepdim=True) - n * (g * n).mean(dims, keepdim=True))).to(X.dtype)
    if need[1]:
        grad_Scale = (grad.to(stash) * n.to(X.dtype)).sum_to_size(Scale.shape).to(Scale.dtype)
    if need[2]:
        grad_B = grad.to(stash).sum_to_size(Scale.shape).to(Scale.dtype)
    return grad_X, grad_Scale, grad_B


def make_translation(opset: int) -> Any:
    from onnxscript.onnx_opset import opset23 as op

    def layer_norm(
        X: Any, Scale: Any, B: Any = None, *, axis: int = -1, epsilon: float = 1e-05, stash_type: int = 1
    ) -> Any:
        attributes = {"axis": axis, "epsilon": epsilon, "stash_type": stash_type}
        Y, *_ = one_node(op.LayerNormalization, (X, Scale, B), attributes, DEFAULTS)
        return Y

    return layer_norm


define_op(
    "layer_norm",
    SCHEMA,
    composite=composite,
    fake=fake,
    setup_context=setup_context,
    backward=backward,
    decomposition=decomposition,
    onnx_name="LayerNormalization",
    since_opset=17,
    make_translation=make_translation,
    takes={
        "types": ["float16", "bfloat16", "float32", "float64"],
        "exact": ["float16", "bfloat16", "float32"],  # stash_type knows no float64
        "alike": ["X", "Scale", "B"],
        "onnxruntime_cpu": ["float16", "bfloat16", "float32", "float64"],
    },
    analytic=True,
    accumulates=True,
)
