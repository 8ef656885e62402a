"""Sizes that are computed of others: frames of a waveform, patches of an image, what a window leaves.

A waveform of the fewest samples that a program admits gives one frame, and an attention over one frame shows nothing.
What a program is evaluated at has to be long enough for what is computed of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch.fx import Node

_MANY = 1000
_LONGEST = 1 << 17
"""A symbol is tried up to this size."""


def derived_sizes(nodes: Iterable[Node]) -> dict[Any, tuple[Any, ...]]:
    """By symbol, the sizes of tensors that are computed of it alone and can be smaller than it is."""
    found: dict[Any, dict[Any, None]] = {}
    for node in nodes:
        value = node.meta.get("val")
        sizes: tuple[Any, ...] = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
        for size in sizes:
            if not isinstance(size, torch.SymInt):
                continue
            expr = size.node.expr
            if len(expr.free_symbols) != 1 or expr.is_Symbol:
                continue
            (symbol,) = expr.free_symbols
            if _at(expr, symbol, _MANY) < _MANY:
                found.setdefault(symbol, {})[expr] = None
    return {symbol: tuple(sizes) for symbol, sizes in found.items()}


def long_enough(symbol: Any, size: int, derived: tuple[Any, ...], least: int) -> bool:
    """Is each of the sizes that are computed of the symbol at least this, where the symbol is `size`?"""
    return all(_at(expr, symbol, size) >= least for expr in derived)


@lru_cache(maxsize=1024)
def shortest(symbol: Any, low: int, high: int | None, derived: tuple[Any, ...], least: int) -> int | None:
    """The smallest size from `low` on, of those that are tried, at which all derived sizes are at least this."""
    above = min(high, _LONGEST) if high is not None else _LONGEST
    before, size = low, low
    while not long_enough(symbol, size, derived, least):
        if size >= above:
            return None
        before, size = size + 1, min(above, size + max(1, size // 2))
    while before < size:  # all of them grow with the symbol, or nearly: what is found fits in any case
        middle = (before + size) // 2
        if long_enough(symbol, middle, derived, least):
            size = middle
        else:
            before = middle + 1
    return size


@lru_cache(maxsize=65536)
def _at(expr: Any, symbol: Any, size: int) -> int:
    try:
        return int(expr.xreplace({symbol: _integer(size)}))
    except (TypeError, ValueError, ZeroDivisionError, AssertionError):
        return 0  # it has no value there


def _integer(size: int) -> Any:
    from sympy import Integer

    return Integer(size)
