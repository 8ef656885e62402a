"""Numbers that float32 cannot hold, kept on the way to ONNX.

torch.onnx (2.13) writes a number in a call as a float32 constant and casts it. So ``mask * finfo(float64).min`` becomes
a product with -inf, which is nan where the mask is 0. Here such a number becomes a tensor without dimensions that
`full` makes, and the translation of `full` below keeps its type.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.export import ExportedProgram
from torch.fx import Node

from fxfuse.errors import FxfuseError
from fxfuse.graph.emit import Emitter
from fxfuse.graph.program import copy_program
from fxfuse.graph.source import source_line
from fxfuse.graph.view import op_name, tensor
from fxfuse.torch_seams import schema_of

_LARGEST = torch.finfo(torch.float32).max
FULL = torch.ops.aten.full.default
_MAKES = frozenset(["full", "full_like", "new_full"])
"""Operators that make a tensor of a number. torch.onnx decomposes them to `full`, which is translated here."""


def without_wide_numbers(program: ExportedProgram) -> ExportedProgram:
    """The program with every float64 number beyond float32's range as a tensor; `program` itself if there is none.

    Raises:
        FxfuseError: an operator takes such a number as a number only.
    """
    if not any(_wide(node) for node in program.graph.nodes):
        return program
    result = copy_program(program)
    for node in list(result.graph.nodes):
        for place in _wide(node):
            _as_tensor(node, place)
    result.graph.lint()
    result.graph_module.recompile()
    return result


def makes_wide(node: Node) -> bool:
    """Does it make a float64 tensor of a number that float32 cannot hold?"""
    value = tensor(node)
    if value is None or value.dtype != torch.float64 or op_name(node) not in _MAKES:
        return False
    return any(isinstance(a, float) and _beyond(a) for a in node.args)


def full(size: Any, fill_value: Any, dtype: int = ir.DataType.FLOAT, **_: Any) -> Any:
    """`fill_value` everywhere, in `dtype`; `size` is its shape."""
    from onnxscript.onnx_opset import opset23

    op: Any = opset23
    number = ir.tensor(np.array(fill_value, ir.DataType(dtype).numpy()))
    value = op.Constant(value=number)
    return value if size == [] else op.Expand(value, op.Cast(size, to=ir.DataType.INT64))


def _beyond(number: float) -> bool:
    return _LARGEST < abs(number) < float("inf")


def _wide(node: Node) -> list[int]:
    """Positions of the arguments of a float64 call that are numbers beyond float32's range."""
    value = tensor(node)
    if node.op != "call_function" or value is None or value.dtype != torch.float64 or op_name(node) in _MAKES:
        return []
    return [i for i, a in enumerate(node.args) if isinstance(a, float) and _beyond(a)]


def _as_tensor(node: Node, place: int) -> None:
    taken = _taking_tensor(node.target, place)
    if taken is None:
        raise FxfuseError(
            f"torch.onnx writes the numbers of {node.target} in float32, which {node.args[place]} does not fit into",
            where=", ".join(filter(None, (node.name, source_line(node)))),
            hint="use a smaller number, or torch.full in the model's type",
        )
    value = tensor(node)
    assert value is not None
    number = Emitter(node, before=node).call(FULL, [], node.args[place], dtype=torch.float64, device=value.device)
    node.update_arg(place, number)
    node.target = taken


def _taking_tensor(target: Any, place: int) -> Any:
    """The overload of the same operator that takes a tensor there, and all else alike."""
    given = [str(a.type) for a in schema_of(target).arguments]
    if given[place] == "Tensor":
        return target
    wanted = [*given[:place], "Tensor", *given[place + 1 :]]
    for name in target.overloadpacket.overloads():
        overload = getattr(target.overloadpacket, name)
        if [str(a.type) for a in schema_of(overload).arguments] == wanted:
            return overload
    return None
