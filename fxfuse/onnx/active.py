"""Is ``torch.onnx.export`` to fuse, here and now, and how: for the whole process, or within one context."""

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
    """One `install`, or one `with enabled():`."""

    options: Options
    said: set[str] = field(default_factory=set)
    """Warnings that were given already."""

    def warn(self, what: str, error: Exception | None = None) -> None:
        """Say once that an export goes on without fusing, and why."""
        if error is not None:
            what += f" ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''})"
        if what not in self.said:
            self.said.add(what)
            warnings.warn(f"exported as if fxfuse were not there: {what}", FxfuseWarning, stacklevel=callers_level())


_process: Active | None = None
_context: ContextVar[Active | bool] = ContextVar("fxfuse_active", default=True)
"""What holds in this thread and context; True is what holds for the process, False is nothing."""


def current() -> Active | None:
    """What holds here: the innermost context's, else the process's."""
    here = _context.get()
    return here if isinstance(here, Active) else _process if here else None


def for_process(active: Active | None) -> None:
    global _process
    _process = active


@contextmanager
def within(active: Active | None) -> Iterator[None]:
    """Within the block, in this thread and context, `active` holds; None is nothing."""
    token = _context.set(False if active is None else active)
    try:
        yield
    finally:
        _context.reset(token)
