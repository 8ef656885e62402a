"""Time and memory of each stage of a command, printed while it runs and again at the end."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console


@dataclass
class Stages:
    """The stages of one command. A terminal shows a spinner for the running one; elsewhere each prints a line at its
    end."""

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    """Peak memory of the process so far, in bytes, when each stage ended."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block. Its line is printed even if it fails, so that the reader sees how far the command came."""
        started = time.perf_counter()
        try:
            if self.console.is_terminal:
                with self.console.status(f"{name} …"):
                    yield
            else:
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            self.peaks[name] = peak_memory()
            self.console.print(f"  {name:<11} {self.seconds[name]:8.1f} s", highlight=False)


def peak_memory() -> int:
    """The peak resident memory of this process in bytes, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def human(size: float) -> str:
    """``"2.31 GB"``: powers of ten, as disks and file listings count."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
