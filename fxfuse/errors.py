"""The one exception type that bad input raises, and the one warning."""

from __future__ import annotations

import sys


class FxfuseError(Exception):
    """Bad input or an unsupported request.

    The message says what was wrong, where, and what to do about it.

    Attributes:
        what: what was wrong, in one sentence.
        where: the argument, file, node or source line it concerns, if any.
        hint: what the caller can do, if anything is known to help.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = where
        self.hint = hint
        parts = [what]
        if where:
            parts.append(f"  where: {where}")
        if hint:
            parts.append(f"  hint: {hint}")
        super().__init__("\n".join(parts))


class FxfuseWarning(UserWarning):
    """Something was left undone, and the call went on without it; the message says what and why."""


class ParityError(FxfuseError):
    """Two implementations that must compute the same thing did not."""


def callers_level() -> int:
    """`stacklevel` of the code that called torch or fxfuse, for a warning of the function that asks."""
    level, frame, inside = 1, sys._getframe(1), ("torch", "fxfuse", "contextlib")
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    return level
