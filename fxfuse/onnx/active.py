"""Whether ``torch.onnx.export`` is to fuse, and with which options: for the whole process, or within one context."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from fxfuse.errors import FxfuseWarning, callers_level
from fxfuse.options import Options


@dataclass(frozen=True, eq=False)
class Active:
    """The options of one `install` or one `with enabled():`."""

    options: Options
    said: set[str] = field(default_factory=set)
    """Warnings that were given already, so that each is given once."""

    def warn(self, what: str, error: Exception | None = None) -> None:
        """Warn, once for each reason, that an export goes on without fusing."""
        if error is not None:
            what += f" ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''})"
        if what not in self.said:
            self.said.add(what)
            warnings.warn(f"exported as if fxfuse were not there: {what}", FxfuseWarning, stacklevel=callers_level())


_process: Active | None = None
_context: ContextVar[Active | bool] = ContextVar("fxfuse_active", default=True)
"""The options in this thread and context. True: those of the process. False: none, nothing is fused."""


def current() -> Active | None:
    """The options that apply here: those of the innermost context, else those of the process, else None."""
    here = _context.get()
    return here if isinstance(here, Active) else _process if here else None


def for_process(active: Active | None) -> None:
    global _process
    _process = active


@contextmanager
def within(active: Active | None) -> Iterator[None]:
    """Within the block, in this thread and context, these options apply; None: nothing is fused."""
    token = _context.set(False if active is None else active)
    try:
        yield
    finally:
        _context.reset(token)
