"""The two nodes that a FlexAttention is in an ONNX graph until they are made one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

DOMAIN = "fxfuse"
"""Of the two nodes."""
SCORES, OUTPUT = "FlexScores", "FlexOutput"


def half(name: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Sequence[str] = ()) -> Any:
    """Makes the translation that writes one half as a node of `DOMAIN`."""

    def for_opset(opset: int) -> Callable[..., Any]:
        import onnx.defs
        from onnxscript.values import Op, Opset

        Parameter, Attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
        schema = onnx.defs.OpSchema(
            name,
            DOMAIN,
            1,
            inputs=[Parameter(i, f"T{i}") for i in inputs],
            outputs=[Parameter(o, f"T{o}") for o in outputs],
            type_constraints=[(f"T{i}", ["tensor(float)", "tensor(double)"], "") for i in (*inputs, *outputs)],
            attributes=[Attribute(a, onnx.defs.OpSchema.AttrType.FLOAT, "") for a in attributes],
        )
        operator = Op(Opset(DOMAIN, 1), name, schema)

        def translated(*args: Any, **kwargs: Any) -> Any:
            return operator(*args, **kwargs)

        return translated

    return for_opset
