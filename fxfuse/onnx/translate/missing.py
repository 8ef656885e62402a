"""Translations of operators that torch's ONNX exporter has none for, or one that gives other numbers.

As few as possible; each says what would make it superfluous.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.fx import Node

from fxfuse.onnx.translate import sdpa, wide_numbers
from fxfuse.ops.arguments import DOUBLE
from fxfuse.torch_seams import schema_of


def grouped_mm(self: Any, mat2: Any, offs: Any, bias: Any = None, out_dtype: int | None = None) -> Any:
    """Row r of `self` [M, K] times the matrix of its group, `mat2` [G, K, N]; `offs` [G] are the groups' ends.

    Rows after the last group are 0. One MatMul a group: experts are few and their number is static.

    Superfluous once torchlib's `aten__grouped_mm` takes `offs` (https://github.com/microsoft/onnxscript/issues/2795,
    https://github.com/onnx/onnx/issues/7589) and transformers falls back to it on the CPU.
    """
    op = _operators()
    groups = mat2.shape[0]
    if offs is None or bias is not None or not isinstance(groups, int) or len(self.shape) != 2:
        raise NotImplementedError("grouped_mm: only [M, K] by [G, K, N] with offsets and a static G is translated")
    first = op.Constant(value_ints=[0])
    # One Split instead of a Slice a group: onnxscript's SlicesSplit rule tries every pair of slices.
    ends = op.Split(op.Cast(offs, to=7), axis=0, num_outputs=groups) if groups > 1 else [op.Cast(offs, to=7)]
    matrices = op.Split(mat2, axis=0, num_outputs=groups) if groups > 1 else [mat2]
    start, results = first, []
    for end, matrix in zip(ends, matrices, strict=True):
        rows = op.Slice(self, start, end, first)
        results.append(op.MatMul(rows, op.Squeeze(matrix, first)))
        start = end
    count = op.Sub(op.Shape(self, start=0, end=1), start)
    rest = op.Concat(count, op.Shape(mat2, start=2, end=3), axis=0)
    results.append(op.Expand(op.CastLike(op.Constant(value_float=0.0), self), rest))
    result = op.Concat(*results, axis=0)
    return result if out_dtype in (None, -1) else op.Cast(result, to=out_dtype)


def erfinv(self: Any) -> Any:
    """The inverse error function by Newton's method on ONNX's Erf, from a start that is right to 0.2 %.

    The start is Winitzki's, "A handy approximation for the error function and its inverse", 2008. A step divides by
    the slope, exp(-y²); at ±1 it would be 0 by 0, and the start, which is ±inf there, is kept.

    Superfluous once torchlib has `aten::erfinv`. Gemma 3n reads a threshold by it.
    """
    op = _operators()

    def number(value: float) -> Any:
        return op.CastLike(op.Constant(value_float=value), self)

    a = 0.147
    log = op.Log(op.Sub(number(1.0), op.Mul(self, self)))
    half = op.Add(number(2 / (math.pi * a)), op.Mul(number(0.5), log))
    root = op.Sqrt(op.Sub(op.Mul(half, half), op.Mul(number(1 / a), log)))
    y = op.Mul(op.Sign(self), op.Sqrt(op.Sub(root, half)))
    for _ in range(3):
        slope = op.Mul(number(2 / math.sqrt(math.pi)), op.Exp(op.Neg(op.Mul(y, y))))
        step = op.Div(op.Sub(op.Erf(y), self), slope)
        y = op.Where(op.Equal(slope, number(0.0)), y, op.Sub(y, step))
    return y


def right_shift(self: Any, other: Any) -> Any:
    """Integers less what is below 2^other, divided by that: ONNX shifts unsigned integers only, which lose their sign.

    In int64, for 2^31 is no int32. Packed weights are taken apart by it; where they are kept, the result is folded.

    Superfluous once torchlib has `aten::__rshift__.Tensor`, and gives the type that it is given where a number is
    shifted by (uint8 comes back as int16).
    """
    op = _operators()
    x = op.Cast(self, to=7)
    if isinstance(other, int):
        unit = op.Constant(value_int=1 << other)
    else:
        one = op.Cast(op.Constant(value_int=1), to=13)
        unit = op.Cast(op.BitShift(one, op.Cast(other, to=13), direction="LEFT"), to=7)
    return op.Cast(op.Div(op.Sub(x, op.Mod(x, unit)), unit), to=int(self.dtype))


def rms_norm(input: Any, normalized_shape: Sequence[Any], weight: Any = None, eps: float | None = None) -> Any:
    """A call of ``F.rms_norm`` that no pattern took, for it runs over several axes or over one element.

    torch's translation takes float32's epsilon where none is given, and computes in float32, in float64 too: of rows
    around 1e-3 a fifth is lost. As PyTorch has it: https://docs.pytorch.org/docs/stable/generated/torch.nn.RMSNorm.html.

    Superfluous once torch's `aten_rms_norm` asks for the input's type.
    """
    op = _operators()
    wide = int(input.dtype) == DOUBLE
    if eps is None:
        eps = torch.finfo(torch.float64 if wide else torch.float32).eps
    if weight is None:
        weight = op.CastLike(op.Constant(value_float=1.0), input)
    stash = {"stash_type": DOUBLE} if wide else {}
    return op.RMSNormalization(input, weight, axis=-len(normalized_shape), epsilon=eps, **stash)


def _operators() -> Any:
    from onnxscript.onnx_opset import opset23

    return opset23


def _quantised(name: str) -> Callable[..., Any]:
    """A translation of the file beside this one, which imports onnxscript."""

    def translation(*args: Any, **kwargs: Any) -> Any:
        from fxfuse.onnx.translate import quantised

        return getattr(quantised, name)(*args, **kwargs)

    return translation


_BY_NAME: dict[str, Callable[..., Any]] = {
    "transformers::grouped_mm_fallback": grouped_mm,
    "aten::_grouped_mm": grouped_mm,
    "aten::erfinv": erfinv,
    "aten::__rshift__": right_shift,
    "aten::rms_norm": rms_norm,
    "aten::_int_mm": _quantised("int_mm"),
    "quantized_decomposed::quantize_per_tensor": _quantised("quantize_per_tensor"),
    "quantized_decomposed::dequantize_per_tensor": _quantised("dequantize_per_tensor"),
    "torchao::dequantize_affine_float8": _quantised("dequantize_affine_float8"),
    "quantized_decomposed::choose_qparams": _quantised("choose_qparams"),
}


def missing_translations(nodes: Iterable[Node]) -> dict[Any, Callable[..., Any]]:
    """A translation for each operator of these nodes that torch's exporter has none for, or none that always runs."""
    found: dict[Any, Callable[..., Any]] = {}
    nodes = list(nodes)
    if sdpa.translates(nodes):
        found[sdpa.SDPA] = sdpa.scaled_dot_product_attention
    if any(wide_numbers.makes_wide(node) for node in nodes):
        found[wide_numbers.FULL] = wide_numbers.full
    for node in nodes:
        schema = schema_of(node.target)
        if schema is not None and schema.name in _BY_NAME:
            found[node.target] = _BY_NAME[schema.name]
    return found
