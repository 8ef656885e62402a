"""The names of dimensions in an ONNX graph."""

from __future__ import annotations

import warnings
from typing import Any

import onnx_ir as ir
import torch
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind

from fxfuse.errors import FxfuseWarning, callers_level
from fxfuse.onnx.capturing.asked import Inputs, asked, hint, name_of, named


def axis_names(model: object, inputs: Inputs, dynamic_shapes: Any, program: ExportedProgram) -> Any:
    """The names of dimensions as ``torch.onnx.export`` of `program` takes them: a dict for each input of the graph;
    None if there are no names.

    Args:
        model: what `program` is the capture of: a module, called with `inputs`, or a program, of whose
            `dynamic_shapes` nothing is known.
    """
    if not any(named(dynamic_shapes)):
        return None
    if not isinstance(model, torch.nn.Module):
        return dynamic_shapes
    specs = [s for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    values = {n.name: n.meta.get("val") for n in program.graph.find_nodes(op="placeholder")}
    axes: dict[int, dict[int, str]] = {i: {} for i, s in enumerate(specs) if not isinstance(s.arg, ConstantArgument)}
    given: dict[str, str] = {}
    for one in asked(model, inputs, dynamic_shapes):
        is_named = isinstance(one.dim, (str, Dim)) and hint(one.dim) is None
        if not is_named or one.axis is None or one.leaf not in axes:
            continue
        size, name = str(values[specs[one.leaf].arg.name].shape[one.axis]), name_of(one.dim)
        if size not in given:  # torch would warn if one size had two names
            axes[one.leaf][one.axis] = given[size] = name
        elif given[size] != name:
            warnings.warn(
                f"{one.where} is called {given[size]!r} in the graph, and not {name!r}: the model needs the two equal",
                FxfuseWarning,
                stacklevel=callers_level(),
            )
    return tuple(axes.values())


def without_numbers(model: ir.Model) -> None:
    """Turn dimensions whose name is a number into that number: torch writes symbols so that the capture fixed."""
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for value in (*values, *(out for node in model.graph.all_nodes() for out in node.outputs)):
        if value.shape is not None and any(_is_number(dim) for dim in value.shape):
            value.shape = ir.Shape([int(dim.value) if _is_number(dim) else dim for dim in value.shape])  # type: ignore[union-attr, arg-type]


def _is_number(dim: Any) -> bool:
    return isinstance(dim, ir.SymbolicDim) and dim.value is not None and dim.value.isdecimal()
