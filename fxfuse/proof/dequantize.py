"""Libraries' own operators for stored integers, in float64: what they compute, without what they round.

They take only the types that they give (torchao asserts as much), or give float32 unless they are told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfuse.graph.view import op_name
from fxfuse.torch_seams import schema_of


def dequantize_affine(
    input: Tensor, block_size: Sequence[int], scale: Tensor, zero_point: Tensor | None, *_: Any, **__: Any
) -> Tensor:
    """torchao's, `_dequantize_affine_no_dtype_check` in torchao/quantization/quant_primitives.py: each block of that
    size has one scale and one zero point."""
    blocks = [size // block for size, block in zip(input.shape, block_size, strict=True)]
    apart = [n for pair in zip(blocks, block_size, strict=True) for n in pair]
    one_each = [n for count in blocks for n in (count, 1)]
    x = input.reshape(apart).to(torch.float64)
    if zero_point is not None:
        x = x - zero_point.reshape(one_each).to(torch.float64)
    return (x * scale.reshape(one_each)).reshape(input.shape)


def quantize(input: Tensor, scale: Tensor | float, zero_point: Tensor | int, *rest: Any, **kwargs: Any) -> Tensor:
    """`quantize_per_tensor` of torch's `quantized_decomposed`, and `quantize_per_channel`, which is given an axis."""
    *axis, low, high, kind = rest

    def spread(value: Tensor | float) -> Tensor:
        value = torch.as_tensor(value, dtype=torch.float64)
        return value.reshape([-1 if d == axis[0] % input.dim() else 1 for d in range(input.dim())] if axis else [])

    rounded = torch.round(input / spread(scale)) + spread(zero_point)
    return rounded.clamp(low, high).to(kind)


def exactly(node: Node) -> tuple[Callable[..., Any] | None, dict[str, Any]]:
    """What to call in the place of this node's operator, None for itself; and keyword arguments to call it with."""
    name = op_name(node)
    if name in ("quantize_per_tensor", "quantize_per_channel"):
        return quantize, {}
    if not name.startswith("dequantize_"):
        return None, {}
    schema = schema_of(node.target)
    if schema.name == "torchao::dequantize_affine":
        return dequantize_affine, {}
    if schema.name.startswith("quantized_decomposed::") and any(a.name == "out_dtype" for a in schema.arguments):
        return None, {"out_dtype": torch.float64}
    return None, {}
