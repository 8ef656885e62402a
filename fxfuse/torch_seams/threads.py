"""What torch has once for a whole process, or once for a program, used so that threads do not meet in it.

Torch traces one program at a time: `make_fx` and ``torch.export.export`` replace methods of `nn.Module` and keep their
state in globals of modules, and two threads that trace at once fail ("ProxyTorchDispatchMode slot already occupied",
"CURRENT_PATCHER is None"). So whatever fxfuse traces, captures or translates it does under one lock. A thread that only
runs models does not wait for it, and is not seen by it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.fx.experimental._config

from fxfuse.torch_seams.names import FakeTensorMode
from fxfuse.torch_seams.parts import refusing_guards

_lock = threading.RLock()
_config: Any = torch.fx.experimental._config


def one_at_a_time() -> AbstractContextManager[Any]:
    """Within the block no other thread traces, captures or translates by way of fxfuse. Blocks nest."""
    return _lock


@contextmanager
def sizes_of_one() -> Iterator[None]:
    """Within the block a dynamic dimension that is 1 in the sample stays dynamic, and none is asked whether it is 1:
    a question would be a guard.

    So ``torch.onnx`` captures and decomposes (`TorchExportNonStrictStrategy` in
    torch/onnx/_internal/exporter/_capture_strategies.py). In torch 2.13 the setting is of this thread alone; where a
    release has one for the process, the lock sees to it that it is put back to what it was.
    """
    with one_at_a_time(), _config.patch(backed_size_oblivious=True):
        yield


@contextmanager
def entered(mode: FakeTensorMode | None) -> Iterator[None]:
    """Within the block operators run on fake tensors of this mode, which programs share with their copies."""
    if mode is None:
        yield
        return
    with one_at_a_time(), mode:
        yield


@contextmanager
def unguarded(mode: FakeTensorMode | None) -> Iterator[None]:
    """Within the block a question that would be a guard on a symbolic size of this mode raises.

    The mode's cache is off: it makes views by asking whether they fit their storage, which is such a question where
    they slice a table.
    """
    if mode is None:
        yield
        return
    with one_at_a_time(), refusing_guards(mode.shape_env), uncached(mode):
        yield


@contextmanager
def uncached(mode: FakeTensorMode) -> Iterator[None]:
    """Within the block the mode's cache is off, for this thread and, as the mode is the caller's, put back after it."""
    with one_at_a_time():
        enabled, mode.cache_enabled = mode.cache_enabled, False
        try:
            yield
        finally:
            mode.cache_enabled = enabled


@contextmanager
def silenced(*loggers: str) -> Iterator[None]:
    """Within the block what this thread logs with these loggers is left out; what other threads log is not."""
    filters = _OfThisThread()
    named = [logging.getLogger(name) for name in loggers]
    for logger in named:
        logger.addFilter(filters)
    try:
        yield
    finally:
        for logger in named:
            logger.removeFilter(filters)


class _OfThisThread(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self.thread
