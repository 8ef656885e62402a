"""What torch and transformers say while they work for fxfuse, and a caller can do nothing about.

with quiet():
    torch.onnx.export(program, ...)

Within the block these are left out, in this thread; whatever else is said, warned or logged comes through:

    torchvision is not installed. Skipping torchvision::nms        at every export, whether or not the model has it
    Failed to infer the signature for function …                   of a library's translation, which works without one
    `dynamic=True` with no explicit `dynamic_shapes` …             of an argument that fxfuse passes
    Unable to find user code corresponding to {u0}                 before an error that says more
    def forward(self, arg0_1): …                                   twice, as far as a capture came that failed
    [torch.onnx] Run decompositions...                             where nobody asked for it; see `fxfuse.onnx.hooks`
    FutureWarning: `isinstance(treespec, LeafSpec)` …              where torch copies a program
"""

from __future__ import annotations

import builtins
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from fxfuse.patches import Patch, applied, attribute
from fxfuse.torch_seams import IDLE_LOGGERS, export_trace, pytree
from fxfuse.versions import TRANSFORMERS_EXPORTER

_quiet: ContextVar[bool] = ContextVar("fxfuse_quiet", default=False)
_copying: ContextVar[bool] = ContextVar("fxfuse_copying", default=False)
_IDLE = ("torchvision is not installed", "Unable to find user code", "`dynamic=True` with no explicit")
_UNREAD = "Failed to infer the signature for function"


def is_quiet() -> bool:
    """Is this thread within the block?"""
    return _quiet.get()


@contextmanager
def quiet(*expected: str) -> Iterator[None]:
    """Within the block, what stands above is left out, and what torch logs that begins with one of `expected`."""
    idle = _Idle(expected)
    loggers = list(map(logging.getLogger, IDLE_LOGGERS))
    if (module := sys.modules.get(TRANSFORMERS_EXPORTER)) is not None:
        loggers.append(vars(module)["logger"])
    for logger in loggers:
        logger.addFilter(idle)
    try:
        with shared_specs(), applied(_prints, _quiet):
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(idle)


@contextmanager
def shared_specs() -> Iterator[None]:
    """Within the block, copies of tree specs share their leaves, which are frozen.

    `copy.deepcopy` of a leaf makes one, and the class of leaves is deprecated, which torch warns of (from 2.11 on, if
    not before): torch's own copies too (`_get_updated_module_call_graph` in torch/export/exported_program.py).
    """
    with applied(_leaves, _copying):
        yield


def _leaves() -> Iterator[Patch]:
    if (leaf := vars(pytree).get("LeafSpec")) is not None:
        yield attribute(leaf, "__deepcopy__", lambda self, memo: self)


def _prints() -> Iterator[Patch]:
    """`_log_export_wrapper` prints the graph of a failed capture, and stands around two functions, one in the other."""
    yield attribute(export_trace(), "print", _print)


def _print(*args: Any, **kwargs: Any) -> None:
    if not is_quiet():
        builtins.print(*args, **kwargs)


class _Idle(logging.Filter):
    """Lets through what other threads log, and all but those few messages of this one."""

    def __init__(self, expected: tuple[str, ...]) -> None:
        super().__init__()
        self.idle = _IDLE + expected
        self.thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self.thread:
            return True
        message = record.getMessage()
        if message.startswith(_UNREAD) and isinstance(record.args, tuple):
            # A caller's own translation (`custom_translation_table`) is the caller's to mend.
            return getattr(record.args[0], "__module__", "").partition(".")[0] not in ("transformers", "fxfuse")
        return not message.startswith(self.idle)
