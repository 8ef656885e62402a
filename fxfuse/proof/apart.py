"""Sizes that are equal in the sample, and that recognition took to be equal: do they have to be?

Where a region cannot be run with different sizes, the program itself fails there, and nothing is lost. Where it can
be run
(a size of 1 that is broadcast, a view that spreads twice the batch over the lengths), the replacement has to give the
same, or the two have to be one symbol.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fxfuse.graph.region import Region
from fxfuse.graph.view import fake, is_size
from fxfuse.proof.draws import Variant

if TYPE_CHECKING:
    from fxfuse.recognise.probe import Probe

ONE_DIM = "name them with one Dim"
"""What a caller can do to say that two sizes are equal; for messages."""
_BASES = (3, 5, 7, 4, 9, 8)


def groups(region: Region, ties: Sequence[tuple[Any, Any]]) -> list[list[Any]]:
    """Symbols of the region that the ties take to be equal."""
    symbols: dict[Any, None] = {}
    sizes: list[Any] = [d for n in region.inputs for d in fake(n).shape]
    sizes += [i.meta["val"] for n in region.nodes for i in n.all_input_nodes if is_size(i)]
    for size in sizes:
        if isinstance(size, torch.SymInt):
            symbols.update(dict.fromkeys(sorted(size.node.expr.free_symbols, key=str)))
    found: dict[Any, list[Any]] = {}
    first = {a.node.expr: b.node.expr for a, b in ties}
    for symbol in symbols:
        found.setdefault(first.get(symbol, symbol), []).append(symbol)
    return [group for group in found.values() if len(group) > 1]


def together(symbols: Sequence[Any], ask: Probe) -> str:
    """``"x.shape[0] and memory.shape[0]"``"""
    return " and ".join(sorted(ask.places.get(s, str(s)) for s in symbols))


def must_be_equal(guard: str, region: Region, ask: Probe) -> str | None:
    """The advice for a replacement whose tracing asks, in this guard, whether two sizes are equal; None where the guard
    asks anything else."""
    asked = set(re.findall(r"\w+", guard))
    for group in groups(region, ask.ties):
        symbols = [symbol for symbol in group if str(symbol) in asked]
        if len(symbols) > 1:
            return f"only where {together(symbols, ask)} are equal, as in the sample: {ONE_DIM}"
    return None


def apart(region: Region, ask: Probe) -> Iterator[tuple[Variant, str]]:
    """Draws at which one of several equal sizes is another one, or 1, or twice as large; and what is equal."""
    tied = groups(region, ask.ties)
    even = {s: _BASES[i % len(_BASES)] for i, group in enumerate(tied) for s in group}
    for group in tied:
        said = together(group, ask)
        size = even[group[0]]
        for number, symbol in enumerate(group):
            for other in (1, size + 1, 2 * size):
                moved = {**even, symbol: other}
                yield Variant(f"{symbol} {other} beside {size}", large=tuple(moved.items())), said
                if number and len(group) > 2:
                    moved = {**even, **dict.fromkeys(group, other), symbol: size}
                    yield Variant(f"{symbol} {size} beside {other}", large=tuple(moved.items())), said
    if len(tied) > 1:  # a view may make twice the length of twice the batch
        for symbol in tied[0]:
            for second in tied[1]:
                sizes = {**even, symbol: 2 * even[symbol], second: 2 * even[second]}
                said = f"{ask.places.get(symbol, symbol)} and the sizes that equal it in the sample"
                yield Variant(f"{symbol} and {second} doubled", large=tuple(sizes.items())), said
