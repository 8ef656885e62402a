"""What patterns need while a program is captured, so that they find in it what they look for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from fxfuse.errors import FxfuseWarning, callers_level
from fxfuse.recognise.answers import Captures
from fxfuse.recognise.catalogue import catalogue


@contextmanager
def as_patterns_need() -> Iterator[None]:
    """Within the block, in this thread, a program is captured as the patterns of the catalogue need it.

    A pattern that fails to say what it needs is left out, with an `FxfuseWarning`.
    """
    with ExitStack() as stack:
        for pattern in catalogue():
            if isinstance(pattern, Captures):
                try:
                    stack.enter_context(pattern.capturing())
                except Exception as error:  # a user's pattern must not take the export down
                    what = f"captured without what the pattern {pattern!r} needs: {type(error).__name__}: {error}"
                    warnings.warn(what, FxfuseWarning, stacklevel=callers_level())
        yield
