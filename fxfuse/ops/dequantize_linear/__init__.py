"""fxfuse::dequantize_linear, which is DequantizeLinear of ONNX: stored integers become the numbers that they stand for.

https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html

    y = (x - x_zero_point) · x_scale

x             [D0, ..., Dn], any layout: int8, uint8, int16, uint16, int32, float8_e4m3fn, float8_e5m2
x_scale       float32, float16 or bfloat16 (float64 here too, not in ONNX): one number [] or [1], one for each entry of
              dimension `axis` [D_axis], or, with a `block_size`, one for each block of that many entries along `axis`:
              [D0, ..., ceil(D_axis / block_size), ..., Dn]
x_zero_point  x_scale's shape, x's type; zeros if left out. int32 has none
output_dtype  ONNX's number of y's type; 0 is x_scale's
y             x's shape, contiguous; computed in float32 (in float64 for a result of that type) and rounded once

Integers of four bits are carried a byte each, in int8 or uint8: PyTorch has types of the name (`torch.int4`), but no
operator that computes with them. They take half a byte in an ONNX file: `fxfuse.onnx.translate.packed` writes what is
kept in INT4 and UINT4 wherever all the values fit.

Raises FxfuseError, naming the argument: shapes or types that do not fit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxfuse.ops.arguments import ONNX_FLOATS, differ, equal, onnx_float, refuse, show
from fxfuse.ops.outputs import one_node
from fxfuse.ops.registry import define_op

SCHEMA = (
    "(Tensor x, Tensor x_scale, Tensor? x_zero_point=None, *, int axis=1, int block_size=0, int output_dtype=0)"
    " -> Tensor"
)
DEFAULTS = {"axis": 1, "block_size": 0, "output_dtype": 0}
STORED = (
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
"""Types of x that PyTorch and ONNX both have."""

NARROW = {"INT4": (-8, 7), "UINT4": (0, 15)}
"""Types of ONNX that hold half a byte each, and what they hold; INT2 and UINT2 are younger, and no runtime has them."""


def stored_as(dtype: torch.dtype, low: int, high: int) -> str:
    """ONNX's name of the smallest type that integers of this type, which are all in [low, high], can be written in."""
    if dtype in (torch.int8, torch.uint8):
        names = ("INT4", "UINT4") if dtype == torch.int8 else ("UINT4", "INT4")
        for name in names:
            if NARROW[name][0] <= low and high <= NARROW[name][1]:
                return name
    return str(dtype).removeprefix("torch.").upper()


def check(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    axis: int,
    block_size: int,
    output_dtype: int,
    named: str = "x",
) -> tuple[int, torch.dtype]:
    """The axis, counted from the front, and the result's type; raises FxfuseError on arguments that do not fit.

    Args:
        named: the integers; scales and zero points are named after them.
    """
    scale, zero = f"{named}_scale", f"{named}_zero_point"
    if x.dtype not in STORED:
        refuse(f"x is {x.dtype}; it must be one of {', '.join(str(t) for t in STORED)}", "x")
    if x_scale.dtype not in ONNX_FLOATS.values():
        refuse(f"{scale} is {x_scale.dtype}, no floating-point type of ONNX", scale)
    if x_zero_point is not None:
        if x_zero_point.dtype != x.dtype:
            refuse(f"{zero} is {x_zero_point.dtype}, {named} {x.dtype}", zero)
        if x.dtype == torch.int32:
            refuse("int32 has no zero point", zero)
        alike = x_zero_point.dim() == x_scale.dim() and not any(map(differ, x_zero_point.shape, x_scale.shape))
        if not alike and not (is_one(x_zero_point) and is_one(x_scale)):
            refuse(f"{zero} is {show(x_zero_point)}, {scale} {show(x_scale)}", zero)
    rank = x.dim()
    if block_size < 0:
        refuse(f"block_size must not be negative, it is {block_size}", "block_size")
    if x_scale.dim() > 0 and not -rank <= axis < rank:
        refuse(f"axis {axis} is no dimension of x {show(x)}", "axis")
    axis = axis % rank if rank else 0
    if block_size:
        wanted = [-(-size // block_size) if d == axis else size for d, size in enumerate(x.shape)]
        if x_scale.dim() != rank or any(map(differ, x_scale.shape, wanted)):
            refuse(
                f"{scale} must be {wanted} for {named} {show(x)} in blocks of {block_size} along {axis}, it is "
                f"{show(x_scale)}",
                scale,
            )
    elif not is_one(x_scale) and (x_scale.dim() > 1 or differ(x_scale.shape[0], x.shape[axis])):
        refuse(f"{scale} must be one number or [{x.shape[axis]}], it is {show(x_scale)}", scale)
    return axis, onnx_float(output_dtype, "output_dtype") if output_dtype else x_scale.dtype


def is_one(values: Tensor) -> bool:
    """One number for all: [], or, as ONNX's own tests have it too, [1]."""
    return values.dim() == 0 or (values.dim() == 1 and equal(values.shape[0], 1))


def spread(values: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """Scales or zero points, so that they can be broadcast against x."""
    if is_one(values) and not block_size:
        return values.reshape([])
    if block_size:
        return values.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
    return values.reshape([-1 if d == axis else 1 for d in range(x.dim())])


def distances(x: Tensor, x_zero_point: Tensor | None, axis: int, block_size: int, kind: torch.dtype) -> Tensor:
    """x - x_zero_point, in the type `kind`."""
    whole = x.to(kind)
    return whole if x_zero_point is None else whole - spread(x_zero_point.to(kind), x, axis, block_size)


def composite(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    axis, out = check(x, x_scale, x_zero_point, axis, block_size, output_dtype)
    kind = torch.float64 if torch.float64 in (out, x_scale.dtype) else torch.float32
    y = distances(x, x_zero_point, axis, block_size, kind) * spread(x_scale.to(kind), x, axis, block_size)
    return y.to(out).contiguous()


def fake(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    _, out = check(x, x_scale, x_zero_point, axis, block_size, output_dtype)
    return torch.empty(x.shape, dtype=out, device=x.device)


def setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    x, x_scale, x_zero_point = inputs
    ctx.save_for_backward(x, x_zero_point)
    ctx.axis = keyword_only_inputs["axis"] % x.dim() if x.dim() else 0
    ctx.block_size = keyword_only_inputs["block_size"]
    ctx.scales, ctx.dtype, ctx.one = x_scale.shape, x_scale.dtype, is_one(x_scale)


def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None]:
    """Of x_scale alone: integers have no gradient."""
    x, x_zero_point = ctx.saved_tensors
    if not ctx.needs_input_grad[1]:
        return None, None, None
    kind = torch.promote_types(grad.dtype, torch.float32)
    each = grad.to(kind) * distances(x, x_zero_point, ctx.axis, ctx.block_size, kind)
    if ctx.block_size:
        size = each.shape[ctx.axis]
        room = ctx.scales[ctx.axis] * ctx.block_size - size
        if room:
            rest = [ctx.axis == d for d in reversed(range(each.dim()))]
            each = torch.nn.functional.pad(each, [n for last in rest for n in (0, room if last else 0)])
        each = torch.unflatten(each, ctx.axis, (ctx.scales[ctx.axis], ctx.block_size)).sum(ctx.axis + 1)
    elif ctx.one:
        each = each.sum()
    elif each.dim() > 1:
        each = each.sum([d for d in range(each.dim()) if d != ctx.axis])
    return None, each.to(ctx.dtype).reshape(ctx.scales), None


def make_translation(opset: int) -> Any:
    from onnxscript.onnx_opset import opset23 as op

    def dequantize_linear(
        x: Any, x_scale: Any, x_zero_point: Any = None, *, axis: int = 1, block_size: int = 0, output_dtype: int = 0
    ) -> Any:
        attributes = {"axis": axis, "block_size": block_size, "output_dtype": output_dtype}
        return one_node(op.DequantizeLinear, (x, x_scale, x_zero_point), attributes, DEFAULTS)

    return dequantize_linear


define_op(
    "dequantize_linear",
    SCHEMA,
    composite=composite,
    fake=fake,
    setup_context=setup_context,
    backward=backward,
    decomposition=composite,
    onnx_name="DequantizeLinear",
    since_opset=23,
    make_translation=make_translation,
    analytic=True,
)
