"""`fxfuse.prepass`: fuse whatever a function exports, or say how a module is to be fused when it is exported.

export = fxfuse.prepass(torch.export.export)      # a function that returns a program: it returns it fused

@fxfuse.prepass(opset=24, patterns=[rms_norm])    # a module class or instance: the exporters read this
class Block(nn.Module): ...

A module is only marked. The mark is kept beside it, so that its `forward`, `state_dict` and pickle are what they were;
a class's mark holds for its subclasses, an instance's for this one object and not for copies of it. The exporters see
it on the module that they are given: a program that was captured before carries none.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, overload

from torch import nn
from torch.export import ExportedProgram

from fxfuse.errors import FxfuseError
from fxfuse.fusion import fuse_with
from fxfuse.options import Options
from fxfuse.recognise.captured import as_patterns_need
from fxfuse.torch_seams import sizes_of_one

T = TypeVar("T", bound=Callable[..., Any])

_classes: weakref.WeakKeyDictionary[type[nn.Module], Options] = weakref.WeakKeyDictionary()
_instances: dict[int, tuple[weakref.ref[nn.Module], Options]] = {}
"""By id and not by the module: a subclass may define equality, or forbid hashing."""
_functions: weakref.WeakKeyDictionary[Callable[..., Any], Callable[..., Any]] = weakref.WeakKeyDictionary()
"""Decorated functions and what they decorate. Not an attribute: another decorator's `wraps` would copy it."""


@overload
def prepass(target: None = None, /, **options: Any) -> Callable[[T], T]: ...
@overload
def prepass(target: T, /, **options: Any) -> T: ...
def prepass(target: Any = None, /, **options: Any) -> Any:
    """Fuse what `target` exports.

    Args:
        target: a function that returns an `ExportedProgram`, an `nn.Module` class or an `nn.Module`. Left out, a
            decorator for these is returned.
        **options: those of `fxfuse.fuse`: ``opset``, ``patterns``, ``prove``, ``frozen``, ``accept``, ``budget``,
            ``strict`` and what single patterns have. Of a module, ``opset`` is by default that of its export, and
            where both are said it is fused for the older of the two; ``frozen`` is then True by default.

    Returns:
        For a function another of the same name and signature, which returns the program fused, and raises FxfuseError
        when the function returns something else. Decorated twice, it fuses once, as the outer decorator says.
        For a module or class `target` itself: `fxfuse.onnx.export`, and ``torch.onnx.export`` while the plugin is
        installed, fuse it with these options.

    Raises:
        FxfuseError: bad options, or a target that is none of these.
    """
    given = Options.given(**options)
    return functools.partial(_apply, given) if target is None else _apply(given, target)


def options_of(module: object) -> Options | None:
    """The options that `module`, or else its class, was marked with."""
    mark = _instances.get(id(module))
    if mark is not None and mark[0]() is module:
        return mark[1]
    return next((_classes[c] for c in type(module).__mro__ if c in _classes), None)


def _apply(options: Options, target: Any) -> Any:
    if isinstance(target, nn.Module):
        key = id(target)

        def forget(_: object) -> None:
            _instances.pop(key, None)

        _instances[key] = (weakref.ref(target, forget), options)
    elif isinstance(target, type) and issubclass(target, nn.Module):
        _classes[target] = options
    elif isinstance(target, (type, ExportedProgram)) or not callable(target):
        raise FxfuseError(
            f"prepass takes a function that returns an ExportedProgram, or an nn.Module, not {target!r}",
            where="target",
            hint="a program is fused by fxfuse.fuse(program)",
        )
    else:
        return _fused(target, options)
    return target


def _fused(target: Callable[..., Any], options: Options) -> Callable[..., ExportedProgram]:
    function = _functions.get(target, target) if inspect.isfunction(target) else target

    @functools.wraps(function)
    def exported(*args: Any, **kwargs: Any) -> ExportedProgram:
        with as_patterns_need():
            program = _as_dynamic_as_can_be(function, args, kwargs)
        if not isinstance(program, ExportedProgram):
            raise FxfuseError(
                f"the function returned a {type(program).__name__}, not a torch.export.ExportedProgram",
                where=getattr(function, "__qualname__", repr(function)),
                hint="decorate the function that calls torch.export.export",
            )
        return fuse_with(program, options)

    _functions[exported] = function
    return exported


def _as_dynamic_as_can_be(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What the function returns, its samples of 1 dynamic where they are asked to be; where that fails, as it is.

    torch cannot capture a model that adds a batch of 1 to a larger one, both dynamic, any other way.
    """
    try:
        with sizes_of_one():
            return function(*args, **kwargs)
    except Exception:  # whatever the function raises, it raises again
        return function(*args, **kwargs)
