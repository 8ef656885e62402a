"""A module and its sample inputs become an ExportedProgram, or a clear refusal."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from fxfuse.errors import FxfuseError
from fxfuse.flex.capture import flex_capture
from fxfuse.onnx.lengths import general


def capture(
    module: torch.nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: dict[str, Any] | tuple[Any, ...] | list[Any] | None = None,
) -> ExportedProgram:
    """Captures `module` with ``torch.export.export``: non-strict, and strict where that fails.

    Args:
        module: in evaluation mode, with all its submodules.
        args: sample inputs; tensors in any nesting of tuples, lists and dicts.
        kwargs: sample inputs by name.
        dynamic_shapes: as ``torch.export.export`` takes it; a dimension may also be a string, its name in ONNX.

    Raises:
        FxfuseError: a training-mode module, an input that is no tensor or is complex, or a module that neither
            mode of ``torch.export`` captures; the message holds what both said.
    """
    check_module(module)
    with flex_capture():
        return _captured(module, *check_inputs(args, kwargs), dynamic_shapes)


def _captured(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    shapes = without_names(dynamic_shapes)
    failures = []
    for strict in (False, True):
        export = partial(torch.export.export, module, dynamic_shapes=shapes, strict=strict)
        try:
            return general(export(args, kwargs), module, (args, kwargs), export)
        except Exception as error:  # torch.export raises whatever the model, dynamo or a guard raises
            failures.append((strict, error))
    raise FxfuseError(
        "torch.export.export could not capture the module\n"
        + "\n".join(f"  strict={strict}: {_brief(error)}" for strict, error in failures),
        where=type(module).__qualname__,
        hint="make `torch.export.export(module, args, kwargs, dynamic_shapes=...)` work first; "
        "the error above is torch's own",
    ) from failures[0][1]


def check_module(module: torch.nn.Module) -> None:
    """Refuses a module of which any part is in training mode: dropout would be captured."""
    training = [name or "the module itself" for name, part in module.named_modules() if part.training]
    if training:
        more = f" and {len(training) - 1} more" if len(training) > 1 else ""
        raise FxfuseError(
            "the module is in training mode",
            where=f"{type(module).__qualname__}: {training[0]}{more}",
            hint="call .eval() on it first",
        )


def check_inputs(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs as `torch.export` wants them, every leaf a real tensor, a flag or None."""
    if isinstance(args, torch.Tensor):
        args = (args,)
    if not isinstance(args, (tuple, list)):
        raise FxfuseError(f"args must be a tuple of inputs, not {_type(args)}", where="args")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise FxfuseError(f"kwargs must be a dict of inputs, not {_type(kwargs)}", where="kwargs")
    args, kwargs = tuple(args), dict(kwargs or {})
    for root, value in (("args", args), ("kwargs", kwargs)):
        for path, leaf in pytree.tree_leaves_with_path(value):
            check_input(leaf, where=root + pytree.keystr(path))
    return args, kwargs


def check_input(value: Any, where: str) -> None:
    """Refuses what an ONNX graph has no input for. Flags and None are part of the call, and are captured."""
    if isinstance(value, torch.Tensor):
        if value.is_complex():
            raise FxfuseError(
                f"a complex input ({value.dtype}): ONNX operators take no complex tensors",
                where=where,
                hint="pass torch.view_as_real(x), and call torch.view_as_complex in the model",
            )
    elif value is not None and not isinstance(value, bool):
        raise FxfuseError(
            f"an input that is no tensor: {_type(value)}",
            where=where,
            hint="pass a tensor, or bind the value in a module that wraps this one",
        )


def check_program(program: ExportedProgram) -> None:
    """The same for the inputs of a program that is already captured."""
    placeholders = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    for spec in program.graph_signature.input_specs:
        if spec.kind is not InputKind.USER_INPUT:
            continue
        where = f"input {spec.arg.name!r} of the program"
        if isinstance(spec.arg, ConstantArgument):
            check_input(spec.arg.value, where)
        else:
            check_input(placeholders[spec.arg.name].meta.get("val"), where)


def without_names(dynamic_shapes: Any) -> Any:
    """`dynamic_shapes` with every dimension that is only a name replaced by ``Dim.DYNAMIC``."""
    if isinstance(dynamic_shapes, str):
        return Dim.DYNAMIC
    if isinstance(dynamic_shapes, dict):
        return {key: without_names(value) for key, value in dynamic_shapes.items()}
    if isinstance(dynamic_shapes, (tuple, list)):
        return type(dynamic_shapes)(without_names(value) for value in dynamic_shapes)
    return dynamic_shapes


def named(dynamic_shapes: Any) -> Iterator[str]:
    """The names that `dynamic_shapes` gives to dimensions as strings."""
    if isinstance(dynamic_shapes, str):
        yield dynamic_shapes
    elif isinstance(dynamic_shapes, dict):
        for value in dynamic_shapes.values():
            yield from named(value)
    elif isinstance(dynamic_shapes, (tuple, list)):
        for value in dynamic_shapes:
            yield from named(value)


def _type(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _brief(error: Exception, lines: int = 12) -> str:
    text = f"{type(error).__name__}: {error}".strip().splitlines()
    return "\n    ".join(text[:lines] + (["…"] if len(text) > lines else []))
