"""Four operators as another package would bring them: in PyTorch, and as functions of a domain of their own in ONNX."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.values import Opset
from torch import Tensor

DOMAIN = "tests.outside"
domain = Opset(DOMAIN, 1)


@torch.library.custom_op("fxfuse_outside::packed_swiglu", mutates_args=())
def packed_swiglu(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = F.linear(x, weight).chunk(2, -1)
    return F.silu(gate) * up


@packed_swiglu.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


@script(domain, default_opset=op)
def PackedSwiGLU(x, weight):  # type: ignore[no-untyped-def]
    gate, up = op.Split(op.MatMul(x, op.Transpose(weight, perm=[1, 0])), num_outputs=2, axis=-1)
    return gate * op.Sigmoid(gate) * up


@torch.library.custom_op("fxfuse_outside::add_layer_norm", mutates_args=())
def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    added = x + residual
    return F.layer_norm(added, weight.shape, weight, bias, eps), added


@add_layer_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@script(domain, default_opset=op)
def AddLayerNorm(x, residual, weight, bias, eps: float = 1e-5):  # type: ignore[no-untyped-def]
    added = x + residual
    y = op.LayerNormalization(added, weight, bias, axis=-1, epsilon=eps)
    return y, added


@torch.library.custom_op("fxfuse_outside::int8_linear", mutates_args=())
def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return F.linear(x, (weight.to(x.dtype) - zero_point.to(x.dtype)) * scale)


@int8_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@script(domain, default_opset=op)
def Int8Linear(x, weight, scale, zero_point):  # type: ignore[no-untyped-def]
    dequantised = (op.CastLike(weight, x) - op.CastLike(zero_point, x)) * scale
    return op.MatMul(x, op.Transpose(dequantised, perm=[1, 0]))


@torch.library.custom_op("fxfuse_outside::route", mutates_args=())
def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    weights, experts = torch.topk(logits.softmax(-1), k, -1)
    return weights / weights.sum(-1, keepdim=True), experts


@route.register_fake
def _(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*logits.shape[:-1], k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


@script(domain, default_opset=op)
def Route(logits, k: int = 2):  # type: ignore[no-untyped-def]
    count = op.Reshape(op.Constant(value_int=k), op.Constant(value_ints=[1]))
    weights, experts = op.TopK(op.Softmax(logits, axis=-1), count)
    normalised = weights / op.ReduceSum(weights, op.Constant(value_ints=[-1]), keepdims=1)
    return normalised, experts
