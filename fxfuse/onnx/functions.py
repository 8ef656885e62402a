"""Operators of other packages as calls of functions in a domain of their own, which the ONNX model carries.

torch.onnx inlines every function that it meets, more than once on its way. So an operator whose translation is an
onnxscript function is written as a node of that function's domain, which torch leaves alone, and the functions are put
into the model when torch is through with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from fxfuse.errors import FxfuseError
from fxfuse.ops.outside import outside
from fxfuse.torch_seams import OpOverload

_TYPES = [f"tensor({t})" for t in ("float", "double", "float16", "bfloat16", "bool", "string")] + [
    f"tensor({sign}int{bits})" for sign in ("", "u") for bits in (4, 8, 16, 32, 64)
]
"""What tensors a function may take: its body says which ones it does."""


_ONLY_TYPES_SINCE = 21
"""From this opset to 25 operators were only given more types, and attributes with a default."""


def function_calls(opset: int) -> dict[OpOverload, Callable[..., Any]]:
    """Translations of the operators that become calls of functions: `add_functions` has to follow.

    One that cannot be had at this opset raises FxfuseError when a program really holds it.
    """
    return {
        overload: _call(op.function, opset, str(overload))
        for overload, op in outside().items()
        if op.function is not None
    }


def _call(function: Any, opset: int, where: str) -> Callable[..., Any]:
    """Writes one node that calls the function."""
    import onnx.defs
    from onnxscript.values import Op, Opset

    defs = onnx.defs.OpSchema
    inputs = [p.name for p in function.op_signature.params if p.is_param()]
    kinds = {p.name: getattr(defs.AttrType, p.type.name) for p in function.op_signature.params if not p.is_param()}
    outputs = [f"y{n}" for n in range(len(function.function_ir.outputs))]
    schema = defs(
        function.name,
        function.opset.domain,
        function.opset.version,
        inputs=[defs.FormalParameter(name, f"T_{name}") for name in inputs],
        outputs=[defs.FormalParameter(name, f"T_{name}") for name in outputs],
        type_constraints=[(f"T_{name}", _TYPES, "") for name in (*inputs, *outputs)],
        attributes=[defs.Attribute(name, kind, "", required=False) for name, kind in kinds.items()],
    )
    operator = Op(Opset(function.opset.domain, function.opset.version), function.name, schema)

    @functools.wraps(function.function)
    def translated(*args: Any, **kwargs: Any) -> Any:
        _bodies(function, opset, where)
        return operator(*args, **kwargs)

    return translated


def add_functions(model: ir.Model) -> None:
    """Put the functions that nodes call, and those that these call, into the model, in place."""
    calls = {node.op_identifier() for node in model.graph.all_nodes() if node.domain}
    for op in outside().values():
        if op.function is None or (op.function.opset.domain, op.function.name, "") not in calls:
            continue
        model.opset_imports[op.function.opset.domain] = op.function.opset.version
        for body in _bodies(op.function, model.opset_imports[""], str(op.overload)):
            for domain, version in body.opset_imports.items():
                model.opset_imports.setdefault(domain, version)
            model.functions[body.identifier()] = body


def _bodies(function: Any, opset: int, where: str) -> list[ir.Function]:
    """The function and those that it calls, in any depth, each a copy, at the model's opset: onnx's checker takes no
    other.

    Raises:
        FxfuseError: one was written for an opset that the model's cannot be made of.
    """
    every = [function, *function.function_ir.get_called_functions().values()]
    return [_at(ir.serde.deserialize_function(one.to_function_proto()), opset, where) for one in every]


def _at(body: ir.Function, opset: int, where: str) -> ir.Function:
    import onnx.defs

    own = body.opset_imports.get("", opset)
    operators = {node.op_type for node in body.all_nodes() if not node.domain}
    newer = any(onnx.defs.get_schema(name, own, "").since_version > opset for name in operators)
    if own < _ONLY_TYPES_SINCE or newer:
        raise _other_opset(body, own, opset, where)
    if own != opset:
        body.opset_imports[""] = opset
    return body


def _other_opset(body: ir.Function, own: int, opset: int, where: str) -> FxfuseError:
    return FxfuseError(
        f"the function {body.domain}::{body.name} is for opset {own}, and cannot be had at the export's, {opset}",
        where=f"onnx= of {where}",
        hint=f"write it with default_opset=onnxscript.opset{opset}",
    )
