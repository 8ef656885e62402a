"""Translations of operators on quantised activations that torch's exporter has none for, or one that gives other
numbers.

Products of integers stay products of integers. ONNX Runtime 1.32 has a fast MatMulInteger for unsigned activations by
signed weights alone: of int8 by int8, [1, 2048] by [2048, 2048], it takes 4.6 ms, where the float product takes 0.22
and the same integers with 128 added, and 128 as their zero point, 0.06 (one thread of an AMD EPYC with VNNI).
"""

from __future__ import annotations

from typing import Any

from onnxscript import onnx_opset

from fxfuse.errors import FxfuseError

op: Any = onnx_opset.opset23

INT8, INT32, INT64, UINT8, FLOAT, DOUBLE = 3, 6, 7, 2, 1, 11
"""`onnx.TensorProto.DataType`."""
_HELD = {INT8: (-128, 127), UINT8: (0, 255), 5: (-32768, 32767), 4: (0, 65535)}


def int_mm(self: Any, mat2: Any) -> Any:
    """`self` int8 [M, K] times `mat2` int8 [K, N], in int32: the product that torchao's dynamic int8 is made of.

    Superfluous once torchlib has `aten::_int_mm`, and ONNX Runtime an int8 by int8 kernel.
    """
    if int(self.dtype) != INT8:
        return op.MatMulInteger(self, mat2)
    shifted = op.Cast(op.Add(op.Cast(self, to=INT32), _number(128, INT32)), to=UINT8)
    return op.MatMulInteger(shifted, mat2, _number(128, UINT8))


def quantize_per_tensor(input: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int, dtype: int) -> Any:
    """clamp(round(input / scale) + zero point), the scale and the zero point being numbers or tensors of one.

    Superfluous once torchlib's takes tensors, and clamps to `quant_min` and `quant_max` as its translation of
    `quantize_per_channel` does.
    """
    x = op.Cast(input, to=FLOAT)
    y = op.QuantizeLinear(x, _of_one(scale, FLOAT), _of_one(zero_point, dtype))
    if (quant_min, quant_max) == _HELD.get(dtype):
        return y
    return op.Clip(y, _number(quant_min, dtype), _number(quant_max, dtype))


def dequantize_per_tensor(
    input: Any,
    scale: Any,
    zero_point: Any,
    quant_min: int,
    quant_max: int,
    dtype: int,
    out_dtype: int | None = None,
) -> Any:
    """(input - zero point) · scale; see `quantize_per_tensor`."""
    y = op.DequantizeLinear(input, _of_one(scale, FLOAT), _of_one(zero_point, dtype))
    return y if out_dtype in (None, -1, FLOAT) else op.Cast(y, to=out_dtype)


def choose_qparams(input: Any, quant_min: int, quant_max: int, eps: float, dtype: int) -> Any:
    """The scale, float64 [1], and the zero point, int64 [1], under which the input's range is just held.

    As `determine_qparams` of torch/ao/quantization/utils.py has it. DynamicQuantizeLinear is the same but for `eps`,
    below which no scale falls here. Superfluous once torchlib has `quantized_decomposed::choose_qparams`.
    """
    zero = _number(0.0, FLOAT)
    x = op.Cast(input, to=FLOAT)
    low = op.Min(op.ReduceMin(x, keepdims=0), zero)
    high = op.Max(op.ReduceMax(x, keepdims=0), zero)
    scale = op.Max(op.Div(op.Sub(high, low), _number(float(quant_max - quant_min), FLOAT)), _number(eps, FLOAT))
    found = op.Sub(_number(float(quant_min), FLOAT), op.Round(op.Div(low, scale)))
    clamped = op.Clip(found, _number(float(quant_min), FLOAT), _number(float(quant_max), FLOAT))
    one = op.Constant(value_ints=[1])
    return op.Reshape(op.Cast(scale, to=DOUBLE), one), op.Reshape(op.Cast(clamped, to=INT64), one)


def _number(value: float, kind: int) -> Any:
    if kind == FLOAT:
        return op.Constant(value_float=value)
    return op.Cast(op.Constant(value_int=int(value)), to=kind)


def _of_one(value: Any, kind: int) -> Any:
    """A number, or a tensor that holds one, as one of no dimensions."""
    if isinstance(value, (int, float)):
        return _number(value, kind)
    return op.Cast(op.Squeeze(value), to=kind)


def dequantize_affine_float8(tensor: Any, scale: Any, output_dtype: int = FLOAT) -> Any:
    """`tensor` in float8 times its scales, which have its rank and one entry for each block, or are one number.

    As torchao/quantization/quant_primitives.py has it. Superfluous once torchlib has this operator.

    Raises:
        FxfuseError: blocks along several axes, which DequantizeLinear does not have.
    """
    sizes, blocks = list(tensor.shape), list(scale.shape)
    if all(b == 1 for b in blocks):
        y = op.DequantizeLinear(tensor, op.Squeeze(scale))
    else:
        cut = [axis for axis, (size, count) in enumerate(zip(sizes, blocks, strict=True)) if size != count]
        if len(cut) > 1:
            raise FxfuseError(
                f"the scales {blocks} of {tensor.name}, in float8, lie in blocks along several axes of {sizes}, and "
                "DequantizeLinear has blocks along one",
                where="torchao.dequantize_affine_float8",
                hint="quantise it by rows (PerRow) or with one scale (PerTensor)",
            )
        axis = cut[0] if cut else len(sizes) - 1
        y = op.DequantizeLinear(tensor, scale, axis=axis, block_size=sizes[axis] // blocks[axis])
    return y if output_dtype in (None, -1, FLOAT) else op.Cast(y, to=output_dtype)
