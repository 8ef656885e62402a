"""Captures as dynamic as those of ``torch.onnx.export``: the settings that it captures under."""

from __future__ import annotations

import linecache
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch

import fxfuse
from fxfuse.patches import Patch, applied, attribute
from fxfuse.torch_seams import (
    CAPTURE_LOGGERS,
    GUARDS_LINE,
    ShapeEnv,
    one_at_a_time,
    recurrent_loops,
    silenced,
    sizes_of_one,
)

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(fxfuse.__file__) + os.sep
_locating: ContextVar[bool] = ContextVar("fxfuse_locating", default=False)
_TRACER = os.path.join("torch", "export", "_trace.py")


@contextmanager
def as_torch_captures(*, oblivious: bool, dynamic: bool) -> Iterator[None]:
    """Within the block ``torch.export.export`` captures as ``torch.onnx.export`` does, guards know their line, and
    errors are raised without being logged.

    Args:
        oblivious: stays a dimension dynamic that is 1 in the sample?
        dynamic: is any dimension dynamic? Then an LSTM or GRU is a loop, of any length.
    """
    with one_at_a_time(), ExitStack() as stack:
        if oblivious:
            stack.enter_context(sizes_of_one())
        if dynamic:
            for loop in recurrent_loops():
                stack.enter_context(loop())
        stack.enter_context(applied(_patches, _locating))
        stack.enter_context(silenced(*CAPTURE_LOGGERS))  # what torch logs of a failure, the exception says too
        yield


def _patches() -> Iterator[Patch]:
    if (original := getattr(ShapeEnv, GUARDS_LINE, None)) is not None:
        yield attribute(ShapeEnv, GUARDS_LINE, _with_line(original))


def _with_line(original: Callable[..., Any]) -> Callable[..., Any]:
    """Where a guard comes from. Without dynamo torch notes the innermost function, which is often its own: here it is
    the model's line as well."""

    def located(self: ShapeEnv, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        unknown = _locating.get() and getattr(found, "maybe_user_loc", "") is None
        if unknown and (line := _models_line()) is not None:
            found = type(found)(found.framework_loc, line)
        return found

    return located


def _models_line() -> str | None:
    """``"model.py:12 in forward: if x.shape[1] % 4:"``, the innermost line outside torch and fxfuse."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.endswith(_TRACER):
        path = frame.f_code.co_filename
        if not path.startswith((_TORCH, _HERE, "<")) and f"{os.sep}sympy{os.sep}" not in path:
            code = linecache.getline(path, frame.f_lineno).strip()
            place = f"{os.path.basename(path)}:{frame.f_lineno} in {frame.f_code.co_name}"
            return f"{place}: {code}" if code else place
        frame = frame.f_back
    return None
