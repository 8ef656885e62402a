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
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, overload

from torch import nn
from torch.export import ExportedProgram

from fxfuse.errors import FxfuseError
from fxfuse.fusion import fuse
from fxfuse.options import BUDGET, Options
from fxfuse.patterns.flex_attention.capturing.capture import flex_capture
from fxfuse.patterns.flex_attention.options import FlexCalls, Windows
from fxfuse.recognise.answers import Pattern
from fxfuse.recognise.questions import BlockMasks
from fxfuse.torch_seams import sizes_of_one

T = TypeVar("T", bound=Callable[..., Any])

_classes: weakref.WeakKeyDictionary[type[nn.Module], Options] = weakref.WeakKeyDictionary()
_instances: dict[int, tuple[weakref.ref[nn.Module], Options]] = {}
"""By id and not by the module: a subclass may define equality, or forbid hashing."""
_functions: weakref.WeakKeyDictionary[Callable[..., Any], Callable[..., Any]] = weakref.WeakKeyDictionary()
"""Decorated functions and what they decorate. Not an attribute: another decorator's `wraps` would copy it."""


@overload
def prepass(target: T, /) -> T: ...
@overload
def prepass(
    target: None = None,
    /,
    *,
    opset: int | None = None,
    patterns: Sequence[Pattern] | None = None,
    verify: Literal["on", "off"] = "on",
    block_mask: BlockMasks = "check",
    flex_attention: FlexCalls = "standard",
    windows: Windows = "mask",
    frozen: bool | None = None,
    accept: Sequence[str] = (),
    budget: float = BUDGET,
    strict: bool = False,
) -> Callable[[T], T]: ...
@overload
def prepass(
    target: T,
    /,
    *,
    opset: int | None = None,
    patterns: Sequence[Pattern] | None = None,
    verify: Literal["on", "off"] = "on",
    block_mask: BlockMasks = "check",
    flex_attention: FlexCalls = "standard",
    windows: Windows = "mask",
    frozen: bool | None = None,
    accept: Sequence[str] = (),
    budget: float = BUDGET,
    strict: bool = False,
) -> T: ...
def prepass(
    target: Any = None,
    /,
    *,
    opset: int | None = None,
    patterns: Sequence[Pattern] | None = None,
    verify: Literal["on", "off"] = "on",
    block_mask: BlockMasks = "check",
    flex_attention: FlexCalls = "standard",
    windows: Windows = "mask",
    frozen: bool | None = None,
    accept: Sequence[str] = (),
    budget: float = BUDGET,
    strict: bool = False,
) -> Any:
    """Fuse what `target` exports.

    Args:
        target: a function that returns an `ExportedProgram`, an `nn.Module` class or an `nn.Module`. Left out, a
            decorator for these is returned.
        opset: ONNX opset the ops must exist in. None is 24 for a function, for a module the opset of its export;
            a module that is exported at another opset is fused for the older of the two.
        patterns: which patterns to look for, in this order; None is the whole catalogue.
        verify: ``"off"`` applies matches that were recognised but not proven.
        block_mask: what of a `BlockMask` counts in flex_attention; see `fxfuse.fuse`.
        flex_attention: what a call of flex_attention becomes; see `fxfuse.fuse`.
        windows: what windows in flex_attention become; see `fxfuse.fuse`.
        frozen: do persistent buffers keep what they hold? None is no for a function, whose program can still be given
            other buffers, and yes for a module on its way to ONNX.
        accept: refusals to overrule by name; see `fxfuse.fuse`.
        budget: seconds after which the search ends; see `fxfuse.fuse`.
        strict: is nothing fused that differs on the smallest rows? See `fxfuse.fuse`.

    Returns:
        For a function another of the same name and signature, which returns the program fused, and raises FxfuseError
        when the function returns something else. Decorated twice, it fuses once, as the outer decorator says.
        For a module or class `target` itself: `fxfuse.onnx.export`, and ``torch.onnx.export`` while the plugin is
        installed, fuse it with these options.

    Raises:
        FxfuseError: bad options, or a target that is none of these.
    """
    options = Options(opset, patterns, verify, block_mask, flex_attention, windows, frozen, accept, budget, strict)
    return functools.partial(_apply, options) if target is None else _apply(options, target)


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
        with flex_capture():
            program = _as_dynamic_as_can_be(function, args, kwargs)
        if not isinstance(program, ExportedProgram):
            raise FxfuseError(
                f"the function returned a {type(program).__name__}, not a torch.export.ExportedProgram",
                where=getattr(function, "__qualname__", repr(function)),
                hint="decorate the function that calls torch.export.export",
            )
        return fuse(program, **options.arguments)

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
