"""Make a plain ``torch.onnx.export(..., dynamo=True, opset_version=24)`` fuse, other libraries' calls included.

fxfuse.onnx.install()              # for the process, until fxfuse.onnx.uninstall()

with fxfuse.onnx.enabled():        # for the block, in this thread (and async context) only
    torch.onnx.export(model, args, "model.onnx", dynamo=True, opset_version=24)

The functions that `fxfuse.onnx.hooks` wraps are private to torch; their signatures are the same in torch 2.11 to 2.15.
They are wrapped while somebody needs it, and put back afterwards. If they look different in a newer torch, nothing is
wrapped, and a warning says so.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from fxfuse.errors import FxfuseWarning, callers_level
from fxfuse.onnx import hooks
from fxfuse.onnx.active import Active, for_process, within
from fxfuse.options import Options
from fxfuse.torch_seams import ONNX_CORE, ONNX_PREPARE, ONNX_TRANSLATE, onnx_core

HOOKS: dict[str, Callable[[hooks.Function], hooks.Function]] = {
    "export": hooks.export,
    ONNX_PREPARE: hooks.prepare,
    ONNX_TRANSLATE: hooks.translate,
}
"""The names of torch's functions, and their wrappers."""

_lock = threading.RLock()
_users = 0
_installed = False
_ours: dict[hooks.Function, hooks.Function] = {}
"""The wrapped functions that stand in torch.onnx now, each with the function that it replaced."""


def install(**options: Any) -> None:
    """From now on ``torch.onnx.export(..., dynamo=True)`` fuses, in every thread, until `uninstall`.

    Installing again only changes the options.

    Args:
        **options: those of `fxfuse.fuse`: ``patterns``, ``prove``, ``accept``, ``budget``, ``strict`` and what single
            patterns have. ``frozen`` is True by default, as it is in a file. ``opset`` is that of the export; where it
            is said, what is fused is for the older of the two. A module that `fxfuse.prepass` marked is fused as the
            mark says.

    An export at an opset outside 23 to 25 (torch's default is 20), or one that fails when it is fused, is done as if
    fxfuse were not installed; one `FxfuseWarning` says why.

    Raises:
        FxfuseError: an option is not what it should be.
    """
    global _installed
    active = Active(Options.given(**options))
    with _lock:
        if not _installed:
            _acquire()
        _installed = True
        for_process(active)


def uninstall() -> None:
    """End what `install` began; nothing happens if it did not. Blocks under `enabled` go on to their end."""
    global _installed
    with _lock:
        for_process(None)
        if _installed:
            _release()
        _installed = False


@contextmanager
def enabled(**options: Any) -> Iterator[None]:
    """Within the block ``torch.onnx.export(..., dynamo=True)`` fuses; the options are those of `install`.

    Blocks nest: the innermost one's options hold, over those of `install` too. A thread that is started within the
    block is not within it.

    Raises:
        FxfuseError: an option is not what it should be.
    """
    active = Active(Options.given(**options))
    with _lock:
        _acquire()
    try:
        with within(active):
            yield
    finally:
        with _lock:
            _release()


def _acquire() -> None:
    global _users
    _users += 1
    try:
        _wrap()
    except (ImportError, Unfamiliar) as error:
        warnings.warn(f"torch.onnx.export will not fuse: {error}", FxfuseWarning, stacklevel=callers_level())


def _release() -> None:
    global _users
    _users -= 1
    if _users == 0:
        _unwrap()


class Unfamiliar(Exception):
    """torch.onnx is not built as it was in the releases that this was written for."""


def _wrap() -> None:
    """Wrap all of `HOOKS`, or none if one of them looks different; what is wrapped already stays so."""
    core = onnx_core()
    found = {name: _checked(name, getattr(core, name, None)) for name in HOOKS}
    for name, function in found.items():
        if function not in _ours:
            wrapped = HOOKS[name](function)
            _ours[wrapped] = function
            setattr(core, name, wrapped)


def _unwrap() -> None:
    """Put torch's functions back. If somebody else wrapped ours meanwhile, it stays under theirs and does nothing."""
    core = onnx_core()
    for name in HOOKS:
        if (current := getattr(core, name, None)) in _ours:
            setattr(core, name, _ours.pop(current))


def _checked(name: str, function: Any) -> hooks.Function:
    """The function, if its signature is as expected: a program or model, `registry` by name, all else optional."""
    where = f"{ONNX_CORE}.{name}"
    if not callable(function):
        raise Unfamiliar(f"this torch has no {where}")
    try:
        first, *others = inspect.signature(function).parameters.values()
    except ValueError as error:
        raise Unfamiliar(f"in this torch {where} has no signature that could be read") from error
    optional = {p.name for p in others if p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    required = {p.name for p in others} - optional
    known = "registry" in {p.name for p in others} and first.kind is first.POSITIONAL_OR_KEYWORD
    if not known or not required <= {"registry"}:
        raise Unfamiliar(f"in this torch {where} takes {inspect.signature(function)}")
    return cast(hooks.Function, function)
