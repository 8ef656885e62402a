"""Tensors rearranged from one layout into another, whatever their sizes: the axes are told by their atoms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch

from fxfuse.patterns.attention.layouts import Atoms, Axes

Lengths = Mapping[str, Any]
"""The size of each atom: a number or a symbol."""


def rearranged(t: torch.Tensor, have: Axes, want: Axes, lengths: Lengths, *, whole: bool = True) -> torch.Tensor:
    """The tensor with the axes `want`; along an atom that it does not have it is repeated.

    Args:
        whole: give every axis its full length; otherwise an axis of which `t` has no atom stays of size 1.
    """
    if have == want or (not whole and _broadcasts(have, want)):
        return t
    have, want = _with_ones(have, want)
    blocks = [_blocks(atoms, want) for atoms in have]
    for place in reversed(range(len(have))):
        if not have[place]:
            t = t.squeeze(place)
        elif len(blocks[place]) > 1:
            t = torch.unflatten(t, place, _sizes(blocks[place], lengths))
    parts = [block for axis in blocks for block in axis]
    given = {a for block in parts for a in block}
    ordered: list[Atoms] = []
    groups: list[int] = []
    for atoms in want:
        missing = set(atoms) - given
        repeated = missing if whole or missing != set(atoms) else set()
        held = [
            (a,) if a in repeated else block for a in atoms for block in [_first(a, parts)] if block or a in repeated
        ]
        ordered.extend(held)
        groups.append(len(held))
    present = [block for block in ordered if block in parts]
    order = [parts.index(block) for block in present]
    if order != sorted(order):
        t = _permuted(t, order)
    for place, block in enumerate(ordered):
        if block not in parts:
            t = t.unsqueeze(place)
    if len(present) < len(ordered):
        t = t.expand([lengths[block[0]] if block not in parts else -1 for block in ordered])
        if max(groups) > 1:  # whether what is repeated can be viewed otherwise depends on its size
            t = t.clone(memory_format=torch.contiguous_format)
    for place, count in enumerate(groups):
        if count == 0:
            t = t.unsqueeze(place)
        elif count > 1:
            t = t.flatten(place, place + count - 1)
    return t


def _with_ones(have: Axes, want: Axes) -> tuple[Axes, Axes]:
    """Give axes of size 1 that both layouts have a name, so that they are moved like all others.

    Otherwise the transpose of the heads of one token would become a view."""
    shared = min(have.count(()), want.count(()))

    def named(axes: Axes) -> Axes:
        left = iter([(f"one {i}",) for i in range(shared)])
        return tuple(axis or next(left, ()) for axis in axes)

    return named(have), named(want)


def _first(atom: str, parts: list[Atoms]) -> Atoms:
    """The block that begins with this atom; empty if none does."""
    return next((block for block in parts if block[0] == atom), ())


def _broadcasts(have: Axes, want: Axes) -> bool:
    """Does a tensor with the axes `have` broadcast against `want` as it is?"""
    own = want[len(want) - len(have) :]
    return len(have) <= len(want) and all(not a or a == b for a, b in zip(have, own, strict=True))


def _permuted(t: torch.Tensor, order: list[int]) -> torch.Tensor:
    moved = [place for place, axis in enumerate(order) if place != axis]
    return t.transpose(*moved) if len(moved) == 2 else t.permute(order)


def _blocks(axis: Atoms, want: Axes) -> list[Atoms]:
    """The atoms of an axis in runs that stay side by side."""
    beside = {(a, b) for w in want for a, b in pairwise(w)}
    blocks: list[Atoms] = []
    for atom in axis:
        if blocks and (blocks[-1][-1], atom) in beside:
            blocks[-1] = (*blocks[-1], atom)
        else:
            blocks.append((atom,))
    return blocks


def _sizes(blocks: list[Atoms], lengths: Lengths) -> list[Any]:
    """The size of each block; -1, for `view` to work out, for one of those whose size is no plain number."""
    sizes = [math.prod(lengths[a] for a in block) for block in blocks]
    for place, size in enumerate(sizes):
        if not isinstance(size, int):
            sizes[place] = -1
            break
    return sizes
