"""Measured numbers, and the literals they come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fxfuse.graph.region import Region


def literals(region: Region) -> set[float]:
    """Every number written in the region's calls."""
    return {float(v) for node in region.nodes for v in _numbers((node.args, node.kwargs))}


def snap(
    measured: float, region: Region, *, tolerance: float = 1e-4, known: Iterable[float] = (), noise: float = 1e-18
) -> float:
    """The number of the region that was measured, or its inverse or negative; else what was measured.

    Args:
        known: numbers that the region reads from tensors.
        noise: what is no larger is 0.
    """
    if abs(measured) <= noise:
        return 0.0
    for value in sorted({*literals(region), *known}, key=lambda v: abs(v - measured)):
        for candidate in (value, -value, *((1 / value,) if value else ())):
            if abs(candidate - measured) <= tolerance * max(abs(candidate), 1e-30):
                return float(candidate)
    short = float(f"{measured:.6g}")
    return short if abs(short - measured) <= 1e-11 * abs(measured) else measured


def _numbers(arg: Any) -> Iterator[float]:
    if isinstance(arg, (int, float)) and not isinstance(arg, bool):
        yield float(arg)
    elif isinstance(arg, dict):
        for value in arg.values():
            yield from _numbers(value)
    elif isinstance(arg, (list, tuple)):
        for value in arg:
            yield from _numbers(value)
