"""RMSNormalization of x and scale in different types.

torch.onnx writes what the model says, a float32 x times a float16 weight, and declares a float32 result. In ONNX the
result has the type of scale, and ONNX Runtime loads neither: "Type (tensor(float)) of output arg (rms_norm) … does not
match expected type (tensor(float16))".
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase

FLOATS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)


class MixedTypes(RewriteRuleClassBase):
    """Cast x and scale to the wider of their types, and the result to the type that the file declares for it."""

    what = "RMSNormalization: x and scale of different types computed in the wider of the two"

    def pattern(self, op: Any, x: Any, scale: Any) -> Any:
        return op.RMSNormalization(x, scale, _outputs=["y"])

    def check(self, context: Any, x: ir.Value, scale: ir.Value, **_: Any) -> MatchResult:  # type: ignore[override]
        result = MatchResult()
        mixed = x.dtype in FLOATS and scale.dtype in FLOATS and x.dtype != scale.dtype
        return result if mixed else result.fail("x and scale are of one type")

    def rewrite(self, op: Any, x: ir.Value, scale: ir.Value, y: ir.Value) -> ir.Value:
        node = y.producer()
        assert node is not None and x.dtype is not None and scale.dtype is not None
        wide = _wider(x.dtype, scale.dtype)
        inputs = [value if value.dtype == wide else op.Cast(value, to=int(wide)) for value in (x, scale)]
        result: ir.Value = op.RMSNormalization(*inputs, **node.attributes)
        declared = y.dtype or scale.dtype
        return result if declared == wide else op.Cast(result, to=int(declared))


def _wider(a: ir.DataType, b: ir.DataType) -> ir.DataType:
    """The narrowest type that holds all values of both; for float16 and bfloat16 that is float32."""
    return ir.DataType.FLOAT if a.itemsize == b.itemsize else max(a, b, key=lambda dtype: dtype.itemsize)


RULES = (MixedTypes,)
