"""The wrappers that three functions inside ``torch.onnx`` get while fxfuse is installed.

    torch.onnx.export(model, …)
      └─ export(model, …)                                     note how the module was marked by `fxfuse.prepass`, and
           │                                                  capture it, as `fxfuse.onnx.export` does
           ├─ _prepare_exported_program_for_export(program)   fuse, before anything is decomposed
           ├─ _exported_program_to_onnx_program(prepared)     finish the result: boolean Where, the report
           └─ put functions of other domains into what torch made of it

Whatever goes wrong in here, the export goes on as if fxfuse were not there, and one warning says why. Two things are
errors all the same. A program that writes to a buffer or an input in place is refused, because torch.onnx would drop
the write without a word. A call of flex_attention that could not be fused is refused with the reason, because
torch.onnx has no operator for it either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from fxfuse.errors import FxfuseError
from fxfuse.fusion import fuse_with
from fxfuse.graph.program import without_guards
from fxfuse.onnx.active import Active, current, within
from fxfuse.onnx.capturing.capture import capture
from fxfuse.onnx.capturing.training import in_training
from fxfuse.onnx.exporter import check_no_higher_order, finish
from fxfuse.onnx.functions import add_functions, function_calls
from fxfuse.onnx.translate.filled_in import with_values
from fxfuse.onnx.translate.missing import missing_translations
from fxfuse.onnx.translate.ready import ready
from fxfuse.ops import holds_fused, translation_table
from fxfuse.ops.opsets import FIRST_OPSET, LAST_OPSET
from fxfuse.options import Options
from fxfuse.prepass import options_of
from fxfuse.quiet import is_quiet
from fxfuse.recognise.captured import as_patterns_need
from fxfuse.state.lift import check_nothing_dropped
from fxfuse.torch_seams import ONNX_PREPARE, one_at_a_time, onnx_core

Function = Callable[..., Any]
Prepare = Callable[..., ExportedProgram]


@dataclass(frozen=True)
class Ready:
    """A program that holds fused operators, and the torch.onnx registry knows how to write them."""

    program: ExportedProgram
    source: ExportedProgram
    """The program that was fused here; the fused program itself, if it came fused."""
    active: Active


_prepared: WeakKeyDictionary[ExportedProgram, Ready] = WeakKeyDictionary()
"""By what torch made of it, the program that goes to translation."""
_marked: ContextVar[Options | None] = ContextVar("fxfuse_marked", default=None)
_verified: ContextVar[bool] = ContextVar("fxfuse_verified", default=False)
"""Will torch run the model before functions can be put into it?"""


def export(original: Function) -> Function:
    @functools.wraps(original)
    def hooked(model: Any, *args: Any, **kwargs: Any) -> Any:
        token, verified = _marked.set(options_of(model)), _verified.set(bool(kwargs.get("verify")))
        if is_quiet() and kwargs.get("verbose") is None:
            kwargs["verbose"] = False  # None prints each step: transformers' exporter does not pass it on
        try:
            if current() is None:
                return original(model, *args, **kwargs)
            with one_at_a_time(), as_patterns_need():
                onnx_program = original(_captured(model, *args, **kwargs), *args, **kwargs)
            add_functions(onnx_program.model)
            return onnx_program
        except Exception as error:
            if isinstance(error.__cause__, FxfuseError):  # torch says that step 2 of 3 failed, and prints ours first
                raise error.__cause__ from None
            raise
        finally:
            _marked.reset(token)
            _verified.reset(verified)

    return hooked


def _captured(
    model: Any, args: Any = (), kwargs: Any = None, *, registry: Any = None, dynamic_shapes: Any = None, **_: Any
) -> Any:
    """The model, captured as every door of fxfuse does; torch's own capture may hold for the sample's sizes alone.

    The model itself is returned if it is not a module in evaluation mode, if it is not to be fused, or if it cannot be
    captured: torch then says why.
    """
    opset = getattr(registry, "opset_version", None)
    fusable = isinstance(opset, int) and FIRST_OPSET <= opset <= LAST_OPSET
    module = isinstance(model, torch.nn.Module) and not isinstance(model, (torch.jit.ScriptModule, GraphModule))
    if not (fusable and module) or in_training(model):
        return model
    try:
        return capture(model, tuple(args), kwargs, dynamic_shapes)
    except Exception:  # torch may take what fxfuse does not, so torch goes on with it
        return model


def prepare(original: Prepare) -> Prepare:
    @functools.wraps(original)
    def hooked(exported_program: ExportedProgram, *, registry: Any, **rest: Any) -> ExportedProgram:
        active = current()
        if active is not None:
            check_nothing_dropped(exported_program)
        ready = None if active is None else _ready(exported_program, registry, active)
        if ready is None:
            return original(exported_program, registry=registry, **rest)
        check_no_higher_order(ready.program, registry.get_decomps)
        try:
            prepared = original(without_guards(ready.program), registry=registry, **rest)
        except Exception as error:
            if ready.source is ready.program:
                raise
            ready.active.warn("torch.onnx could not decompose the fused program", error)
            return original(exported_program, registry=registry, **rest)
        _prepared[prepared] = ready
        return prepared

    return hooked


def translate(original: Function) -> Function:
    @functools.wraps(original)
    def hooked(exported_program: ExportedProgram, *, registry: Any, **rest: Any) -> Any:
        ready = _prepared.pop(exported_program, None)
        if ready is None:
            return original(exported_program, registry=registry, **rest)
        try:
            onnx_program = original(exported_program, registry=registry, **rest)
        except Exception as error:
            if ready.source is ready.program:
                raise
            ready.active.warn("torch.onnx could not translate the fused program", error)
            with within(None):
                plain = getattr(onnx_core(), ONNX_PREPARE)(ready.source, registry=registry)
                return original(plain, registry=registry, **rest)
        finish(onnx_program, ready.program)
        return onnx_program

    return hooked


def _ready(program: ExportedProgram, registry: Any, active: Active) -> Ready | None:
    """The fused program, its translations registered; None, after a warning, if that is not possible."""
    opset = getattr(registry, "opset_version", None)
    if not isinstance(opset, int) or not FIRST_OPSET <= opset <= LAST_OPSET:
        active.warn(
            f"the export is for opset {opset}, and the fused operators exist in opsets {FIRST_OPSET} to "
            f"{LAST_OPSET}; pass opset_version=24 to torch.onnx.export, whose default is older"
        )
        return None
    try:
        fused = program
        if not holds_fused(program):
            options = _marked.get() or active.options
            fused = fuse_with(with_values(program), options.for_export(opset))
        came_fused, fused = fused is program, ready(fused)
        functions = {} if _verified.get() else function_calls(opset)
        table = {**missing_translations(fused.graph.nodes), **translation_table(opset), **functions}
        for operator, translation in table.items():
            own = any(known.is_custom for known in registry.get_decomps(operator))
            if not own:  # the caller's custom_translation_table goes first
                registry.register_op(operator, translation)
        return Ready(fused, fused if came_fused else program, active)
    except Exception as error:  # a plugin must never break somebody else's export
        active.warn("fusing failed", error)
        return None
