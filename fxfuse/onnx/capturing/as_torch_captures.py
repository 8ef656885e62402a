"""Captures as dynamic as those of ``torch.onnx.export``: the settings that it captures under."""

from __future__ import annotations

import linecache
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fxfuse
from fxfuse.one_sizes import sizes_of_one
from fxfuse.patches import Patch, applied, attribute

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(fxfuse.__file__) + os.sep
_TRACER = os.path.join("torch", "export", "_trace.py")


@contextmanager
def as_torch_captures(*, oblivious: bool, dynamic: bool) -> Iterator[None]:
    """Within the block ``torch.export.export`` captures as ``torch.onnx.export`` does, guards know their line, and
    errors are raised without being logged.

    Args:
        oblivious: stays a dimension dynamic that is 1 in the sample?
        dynamic: is any dimension dynamic? Then an LSTM or GRU is a loop, of any length.
    """
    with ExitStack() as stack:
        if oblivious:
            stack.enter_context(sizes_of_one())
        if dynamic:
            for loop in _loops():
                stack.enter_context(loop())
        stack.enter_context(applied(_patches))
        stack.enter_context(_quiet())
        yield


_LOGGERS = "torch.export._trace", "torch._export.non_strict_utils", "torch._guards", "torch._subclasses.fake_tensor"


@contextmanager
def _quiet() -> Iterator[None]:
    """What torch logs of a capture that fails, the exception says too."""
    talking = [logger for name in _LOGGERS if not (logger := logging.getLogger(name)).disabled]
    try:
        for logger in talking:
            logger.disabled = True
        yield
    finally:
        for logger in talking:
            logger.disabled = False


def _patches() -> Iterator[Patch]:
    if hasattr(ShapeEnv, "_get_sloc"):
        yield attribute(ShapeEnv, "_get_sloc", _with_line(ShapeEnv._get_sloc))


def _loops() -> list[Callable[[], AbstractContextManager[None]]]:
    """What torch.onnx enters for recurrent layers, in the releases that have it (`torch.export._patches`)."""
    try:
        from torch.export import _patches
    except ImportError:
        return []
    names = "register_lstm_while_loop_decomposition", "register_gru_while_loop_decomposition"
    return [getattr(_patches, name) for name in names if hasattr(_patches, name)]


def _with_line(original: Callable[..., Any]) -> Callable[..., Any]:
    """Where a guard comes from. Without dynamo torch notes the innermost function, which is often its own: here it is
    the model's line as well."""

    def located(self: ShapeEnv, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        if getattr(found, "maybe_user_loc", "") is None and (line := _models_line()) is not None:
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
