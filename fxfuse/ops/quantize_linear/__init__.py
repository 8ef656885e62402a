"""fxfuse::quantize_linear, which is QuantizeLinear of ONNX: numbers become the integers that stand for them.

https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html

    y = saturate(round(x / y_scale) + y_zero_point)                       halves are rounded to the even neighbour

x             [D0, ..., Dn], any layout: float32, float16 or bfloat16 (float64 here too, not in ONNX)
y_scale       a type of x's kind: one number [] or [1], one for each entry of dimension `axis` [D_axis], or, with a
              `block_size`, one for each block of that many entries along `axis`:
              [D0, ..., ceil(D_axis / block_size), ..., Dn]
y_zero_point  y_scale's shape, y's type; zeros if left out
output_dtype  ONNX's number of y's type; 0 is y_zero_point's, or uint8
precision     ONNX's number of the type in which x is divided; 0 is y_scale's
saturate      of float8 alone: is what lies beyond the type its largest number? Else it becomes nan, or inf
y             x's shape, contiguous: int8, uint8, int16, uint16, float8_e4m3fn, float8_e5m2; it has no gradient

Integers of four and of two bits are carried a byte each, as by `fxfuse.ops.dequantize_linear`: y is int8 or uint8, and
`output_dtype` says that they are INT4, UINT4, INT2 or UINT2. In ONNX a Cast to that byte follows.

Raises FxfuseError, naming the argument: shapes or types that do not fit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxfuse.ops.arguments import ONNX_FLOATS, onnx_float, refuse
from fxfuse.ops.dequantize_linear import check as check_layout
from fxfuse.ops.dequantize_linear import spread
from fxfuse.ops.outputs import one_node
from fxfuse.ops.registry import define_op

SCHEMA = (
    "(Tensor x, Tensor y_scale, Tensor? y_zero_point=None, *, int axis=1, int block_size=0, int output_dtype=0,"
    " int precision=0, int saturate=1) -> Tensor"
)
DEFAULTS = {"axis": 1, "block_size": 0, "output_dtype": 0, "precision": 0, "saturate": 1}
MADE = {
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    17: torch.float8_e4m3fn,
    19: torch.float8_e5m2,
}
"""Types of y by ONNX's numbers."""
CARRIED = {21: (torch.uint8, 0, 15), 22: (torch.int8, -8, 7), 25: (torch.uint8, 0, 3), 26: (torch.int8, -2, 1)}
"""Those that PyTorch has no arithmetic for: what carries them, and what they hold."""


def check(
    x: Tensor, y_scale: Tensor, y_zero_point: Tensor | None, axis: int, block_size: int, output_dtype: int
) -> tuple[int, torch.dtype]:
    """The axis, counted from the front, and the result's type; raises FxfuseError on arguments that do not fit."""
    if x.dtype not in ONNX_FLOATS.values():
        refuse(f"x is {x.dtype}, no floating-point type of ONNX", "x")
    if y_scale.dtype not in ONNX_FLOATS.values():
        refuse(f"y_scale is {y_scale.dtype}, no floating-point type of ONNX", "y_scale")
    known = {**MADE, **{number: kind for number, (kind, _, _) in CARRIED.items()}}
    if output_dtype and output_dtype not in known:
        refuse(f"{output_dtype} is no type that integers are made in; known are {list(known)}", "output_dtype")
    out = known.get(output_dtype, torch.uint8 if y_zero_point is None else y_zero_point.dtype)
    if out not in MADE.values():
        refuse(f"y_zero_point is {out}; it must be one of {', '.join(map(str, MADE.values()))}", "y_zero_point")
    if y_zero_point is not None and y_zero_point.dtype != out:
        refuse(f"y_zero_point is {y_zero_point.dtype}, and output_dtype says {out}", "output_dtype")
    y = torch.empty(x.shape, dtype=out, device="meta")
    axis, _ = check_layout(y, y_scale, y_zero_point, axis, block_size, 0, "y")
    return axis, out


def limits(out: torch.dtype, output_dtype: int) -> tuple[float, float]:
    """The least and the greatest number that y can be."""
    if output_dtype in CARRIED:
        return CARRIED[output_dtype][1:]
    info = torch.finfo(out) if out.is_floating_point else torch.iinfo(out)
    return info.min, info.max


def composite(
    x: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
) -> Tensor:
    axis, out = check(x, y_scale, y_zero_point, axis, block_size, output_dtype)
    kind = onnx_float(precision, "precision") if precision else y_scale.dtype
    divided = x.to(kind) / spread(y_scale.to(kind), x, axis, block_size)
    low, high = limits(out, output_dtype)
    if out.is_floating_point:
        return (divided.clamp(low, high) if saturate else divided).to(out).contiguous()
    wide = divided.round().to(torch.promote_types(kind, torch.float32))
    if y_zero_point is not None:
        wide = wide + spread(y_zero_point.to(wide.dtype), x, axis, block_size)
    return wide.clamp(low, high).to(out).contiguous()


def fake(
    x: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
) -> Tensor:
    _, out = check(x, y_scale, y_zero_point, axis, block_size, output_dtype)
    return torch.empty(x.shape, dtype=out, device=x.device)


def setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
    return None, None, None


def make_translation(opset: int) -> Any:
    from onnxscript import onnx_opset

    op: Any = onnx_opset.opset25 if opset >= 25 else onnx_opset.opset24

    def quantize_linear(
        x: Any,
        y_scale: Any,
        y_zero_point: Any = None,
        *,
        axis: int = 1,
        block_size: int = 0,
        output_dtype: int = 0,
        precision: int = 0,
        saturate: int = 1,
    ) -> Any:
        if output_dtype in CARRIED and y_zero_point is not None:
            y_zero_point = op.Cast(y_zero_point, to=output_dtype)
        attributes = {
            "axis": axis,
            "block_size": block_size,
            "output_dtype": output_dtype,
            "precision": precision,
            "saturate": saturate,
        }
        y = one_node(op.QuantizeLinear, (x, y_scale, y_zero_point), attributes, DEFAULTS)
        carrier = CARRIED.get(output_dtype)
        return y if carrier is None else op.Cast(y, to=3 if carrier[0] == torch.int8 else 2)

    return quantize_linear


define_op(
    "quantize_linear",
    SCHEMA,
    composite=composite,
    fake=fake,
    setup_context=setup_context,
    backward=backward,
    decomposition=composite,
    onnx_name="QuantizeLinear",
    since_opset=23,
    make_translation=make_translation,
)
