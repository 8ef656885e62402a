"""A module and its sample inputs become an ExportedProgram, or a clear refusal."""

from __future__ import annotations

import dataclasses
import enum
import re
import warnings
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch.export import AdditionalInputs, ExportedProgram, ShapesCollection
from torch.export.graph_signature import ConstantArgument, InputKind

from fxfuse.errors import FxfuseError, FxfuseWarning, callers_level
from fxfuse.onnx.capturing.as_torch_captures import as_torch_captures
from fxfuse.onnx.capturing.asked import Inputs, as_auto, asked, for_torch, refined
from fxfuse.onnx.capturing.dynamism import Lost
from fxfuse.onnx.capturing.recapture import general
from fxfuse.onnx.capturing.training import check_nothing_trains, evaluating, in_training
from fxfuse.recognise.captured import as_patterns_need
from fxfuse.report.entries import NOTED, Entry
from fxfuse.torch_seams import one_at_a_time, pytree


def capture(
    module: torch.nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    *,
    strict: bool | None = None,
) -> ExportedProgram:
    """Captures `module` with ``torch.export.export``, as dynamic as ``torch.onnx.export`` does: non-strict, and strict
    where that fails.

    A dimension that the sample or the model fixes although it was asked to be dynamic is tried at other sizes. If it
    stays fixed, that is a warning for ``Dim.AUTO`` and an error otherwise; both name the guard and the model's line.

    Args:
        module: with all its submodules. One in training mode is captured as in evaluation mode, after a warning.
        args: sample inputs; tensors, numbers, texts and None in any nesting of tuples, lists, dicts and dataclasses
            that were registered. All but tensors are constants of the program, as is a number that `dynamic_shapes`
            does not ask to be dynamic.
        kwargs: sample inputs by name.
        dynamic_shapes: as ``torch.export.export`` takes it; a dimension may also be a string, its name in ONNX.
        strict: one of the two only.

    Raises:
        FxfuseError: a module that computes something else in training mode, in which it is; an input that ONNX has
            nothing for; a dimension that stays fixed; or a module that neither mode of ``torch.export`` captures: the
            message holds what both said.
    """
    inputs = check_inputs(args, kwargs)
    modes = (False, True) if strict is None else (strict,)
    if isinstance(dynamic_shapes, (ShapesCollection, AdditionalInputs)):
        collected: Any = dynamic_shapes
        dynamic_shapes = collected.dynamic_shapes(module, *inputs)
    check_devices(module, inputs)
    training = in_training(module)
    with one_at_a_time(), as_patterns_need(), evaluating(module):
        program = _captured(module, inputs, dynamic_shapes, modes)
    if training:
        with as_patterns_need():
            check_nothing_trains(
                module, training, program, lambda: _captured(module, inputs, dynamic_shapes, modes, quiet=True)
            )
        warnings.warn(
            f"{type(module).__qualname__} is in training mode; it is exported as in evaluation mode, in which it "
            "computes the same",
            FxfuseWarning,
            stacklevel=callers_level(),
        )
    return program


def _captured(
    module: torch.nn.Module, inputs: Inputs, dynamic_shapes: Any, modes: tuple[bool, ...], *, quiet: bool = False
) -> ExportedProgram:
    dims = asked(module, inputs, dynamic_shapes)

    def attempt(
        args: tuple[Any, ...], kwargs: dict[str, Any], given: Any = dynamic_shapes, plainly: bool = False
    ) -> ExportedProgram:
        resized = asked(module, (args, kwargs), given)
        shapes = for_torch(given, resized)
        return _attempt(module, (args, kwargs), shapes, modes, dynamic=bool(dims), plainly=plainly)

    given = dynamic_shapes
    try:
        program = attempt(*inputs)
    except CaptureFailed as failed:
        if not (dims and failed.constrained):
            raise
        # Torch's error names the dimension and no guard. A capture with Dim.AUTO has the guard, and shows what else is
        # dynamic.
        given = as_auto(dynamic_shapes)
        try:
            program = attempt(*inputs, given)
        except CaptureFailed:
            raise failed from failed.__cause__
    found, missing = general(program, module, inputs, dims, partial(attempt, given=given))
    if missing:  # that sizes of 1 stay dynamic costs guards on broadcasts, which a plain capture does not make
        with suppress(CaptureFailed):
            plain = partial(attempt, given=given, plainly=True)
            other = general(plain(*inputs), module, inputs, dims, plain)
            found, missing = min((found, missing), other, key=lambda one: len(one[1]))
    if quiet:
        return found
    found.graph_module.meta[NOTED] = [_entry(one) for one in missing]
    fixed = [one for one in missing if one.how == "fixed" and one.asked.strict]
    if fixed:
        raise FxfuseError(
            "a dimension that is asked to be dynamic has one size in the capture\n"
            + "\n".join(f"  {one}" for one in fixed),
            where=type(module).__qualname__,
            hint="leave it out of dynamic_shapes, say Dim.AUTO, or change the line",
        )
    if missing:
        warnings.warn(
            f"{type(module).__qualname__} is not as dynamic as dynamic_shapes asks: "
            + "; ".join(map(str, missing))
            + f". What to do: {_WHAT_TO_DO}",
            FxfuseWarning,
            stacklevel=callers_level(),
        )
    return found


_WHAT_TO_DO = (
    "change that line so that it asks no sizes, give sample inputs of the sizes that the file is for, or leave the "
    "dimension out of dynamic_shapes"
)


def _entry(lost: Lost) -> Entry:
    """The report's entry about a dimension that is not as dynamic as it was asked to be."""
    return Entry(
        "torch.export",
        "near miss",
        (),
        parameters={"dimension": lost.asked.where},
        reason=f"{lost}; {_WHAT_TO_DO}",
        source=lost.guard.line if lost.guard is not None else None,
    )


class CaptureFailed(FxfuseError):
    """Neither mode of ``torch.export`` captures the module."""

    constrained = False
    """Is it about dimensions that were asked to be dynamic?"""


def _attempt(
    module: torch.nn.Module,
    inputs: Inputs,
    shapes: Any,
    modes: tuple[bool, ...],
    *,
    dynamic: bool,
    plainly: bool = False,
) -> ExportedProgram:
    """The first capture that works: sizes of 1 in the sample dynamic, else (`plainly`: only) as ``torch.export.export``
    has it."""
    failures: dict[bool, Exception] = {}
    for oblivious in (False,) if plainly else (True, False) if dynamic else (True,):
        for mode in modes:
            try:
                with as_torch_captures(oblivious=oblivious, dynamic=dynamic):
                    return _exported(module, inputs, shapes, mode)
            except Exception as error:  # torch.export raises whatever the model, dynamo or a guard raises
                failures.setdefault(mode, error)
            if _CONSTRAINED.search(str(failures[mode])):
                break  # the other ways of capturing have the same constraints
    failed = CaptureFailed(
        "torch.export.export could not capture the module\n"
        + "\n".join(f"  strict={mode}: {_brief(error)}" for mode, error in failures.items()),
        where=type(module).__qualname__,
        hint="make `torch.export.export(module, args, kwargs, dynamic_shapes=...)` work first; "
        "the error above is torch's own",
    )
    failed.constrained = any(_CONSTRAINED.search(str(error)) for error in failures.values())
    raise failed from next(iter(failures.values()))


_CONSTRAINED = re.compile("Constraints violated|conflicts between user-specified|specialized")


def _exported(module: torch.nn.Module, inputs: Inputs, shapes: Any, mode: bool) -> ExportedProgram:
    args, kwargs = inputs
    try:
        return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=mode)
    except Exception as error:
        if (other := refined(error, shapes)) is None:
            raise
        return torch.export.export(module, args, kwargs, dynamic_shapes=other, strict=mode)


META = "give them values first: module.to_empty(device='cpu'), then load_state_dict(...); or load with assign=True"


def check_devices(module: torch.nn.Module, inputs: Inputs) -> None:
    """Refuses a module whose weights have no values (meta device) while its inputs do: torch cannot capture the two
    together.

    Raises:
        FxfuseError: the module has such weights.
    """
    real = any(isinstance(leaf, torch.Tensor) and not leaf.is_meta for leaf in pytree.tree_leaves(inputs))
    held = [*module.named_parameters(), *module.named_buffers()]
    empty = [name for name, value in held if value.is_meta]
    if real and empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise FxfuseError("weights on the meta device hold no values", where=f"{empty[0]}{more}", hint=META)


def check_inputs(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs as `torch.export` wants them, every leaf a real tensor, a number, a text or None."""
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
    """Refuses what an ONNX graph has no input for. Numbers, texts and None are part of the call, and are captured."""
    if isinstance(value, torch.Tensor):
        if value.is_complex():
            raise FxfuseError(
                f"a complex input ({value.dtype}): ONNX operators take no complex tensors",
                where=where,
                hint="pass torch.view_as_real(x), and call torch.view_as_complex in the model",
            )
    elif value is not None and not isinstance(value, _CONSTANTS):
        raise FxfuseError(
            f"an input that torch.export does not take: {_type(value)}", where=where, hint=_instead_of(value)
        )


_CONSTANTS = (bool, int, float, str, torch.SymInt, torch.SymFloat, torch.SymBool)


def _instead_of(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return "pass its .value, or bind it in a module that wraps this one"
    if dataclasses.is_dataclass(value):
        return f"call torch.export.register_dataclass({type(value).__qualname__}) first"
    if hasattr(value, "__array__"):
        return "pass torch.as_tensor(x)"
    return "pass a tensor, or bind the value in a module that wraps this one"


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


def _type(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _brief(error: Exception, lines: int = 12) -> str:
    text = f"{type(error).__name__}: {error}".strip().splitlines()
    return "\n    ".join(text[:lines] + (["…"] if len(text) > lines else []))
