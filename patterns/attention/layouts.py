"""How tensors hold the elements of one attention: which axis is the batch, the heads, the positions, the features.

The elements of a tensor were numbered and sent through a region, and arrived at ``[N, rows, columns]``: N matrices of
positions and features. From where the numbers stand follows what each axis of the tensor counts: some part of N, of the
rows or of the columns. Such parts are called atoms. N, for one, may consist of windows, batch and heads, or of batch,
KV heads and repeats.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

Atoms = tuple[str, ...]
Axes = tuple[Atoms, ...]
"""For each axis of a tensor the atoms that it counts, outermost first; no atom for an axis of size 1."""


@dataclass(frozen=True)
class Reading:
    """Where the elements of one tensor are found."""

    found: torch.Tensor
    """``[N, rows, columns]``: at each place the number of the element, counted in the order of memory."""
    shape: tuple[int, ...]
    """The tensor's shape."""
    rows: str
    columns: str
    """What the rows and the columns are called; tensors with the same name for them share the atoms."""


@dataclass(frozen=True)
class Layouts:
    """What the readings say together."""

    axes: tuple[Axes, ...]
    """The axes of each reading, in the order of the readings."""
    sizes: dict[str, int]
    """For each atom the place at which it was found."""

    def of(self, kind: str) -> Atoms:
        """The atoms that N (``"n"``), or some rows or columns, consist of, outermost first."""
        return tuple(a for a in self.sizes if a.rstrip("0123456789") == kind)


def read_layouts(readings: Sequence[Reading]) -> Layouts | None:
    """The axes of each tensor; None where one does not hold each of its elements once, in some order of atoms."""
    lengths: dict[str, int] = {}
    bounds: dict[str, set[int]] = {}
    for reading in readings:
        for kind, length, lines in _lines(reading):
            if lengths.setdefault(kind, length) != length:
                return None
            for line in lines:
                found = _bounds(line)
                if found is None:
                    return None
                bounds.setdefault(kind, set()).update(found)
    sizes: dict[str, int] = {}
    units: dict[str, int] = {}
    for kind, length in lengths.items():
        chain = sorted({1, *bounds[kind], length})
        if any(b % a for a, b in pairwise(chain)):
            return None
        for place, (inner, outer) in enumerate(reversed(list(pairwise(chain)))):
            sizes[f"{kind}{place}"], units[f"{kind}{place}"] = outer // inner, inner
    axes = [_axes(reading, sizes, units) for reading in readings]
    return None if None in axes else Layouts(tuple(a for a in axes if a is not None), sizes)


def _digits(reading: Reading) -> list[torch.Tensor]:
    """The index of each element along each axis of the tensor."""
    strides = [math.prod(reading.shape[k + 1 :]) for k in range(len(reading.shape))]
    return [reading.found // stride % size for stride, size in zip(strides, reading.shape, strict=True)]


def _lines(reading: Reading) -> list[tuple[str, int, list[list[int]]]]:
    digits = [d.long() for d in _digits(reading)]
    n, rows, columns = reading.found.shape
    return [
        ("n", n, [d[:, 0, 0].tolist() for d in digits]),
        (reading.rows, rows, [d[0, :, 0].tolist() for d in digits]),
        (reading.columns, columns, [d[0, 0, :].tolist() for d in digits]),
    ]


def _bounds(line: list[int]) -> set[int] | None:
    """The lengths at which a count goes on with another step: 0 1 2 8 9 10 does after 3. None if it is no such
    count."""
    found = set()
    unit = 1
    while unit < len(line):
        step, count = line[unit] - line[0], 1
        while unit * count < len(line) and line[unit * count] - line[0] == count * step:
            count += 1
        unit *= count
        if len(line) % unit:
            return None
        found.add(unit)
    return found


def _axes(reading: Reading, sizes: dict[str, int], units: dict[str, int]) -> Axes | None:
    """The atoms of each axis, if the elements are counted by them and by nothing else."""
    axes = []
    held: set[str] = set()
    for digits, length in zip(_digits(reading), reading.shape, strict=True):
        steps: dict[str, int] = {}
        counted = torch.zeros_like(digits)
        for dim, kind in enumerate(("n", reading.rows, reading.columns)):
            for atom, size in sizes.items():
                if atom.rstrip("0123456789") != kind or size == 1:
                    continue
                line = digits.select(1, 0).select(1, 0) if dim == 0 else digits[0].select(2 - dim, 0)
                step = int(line[units[atom]] - line[0])
                if not step:
                    continue
                if atom in held:
                    return None
                held.add(atom)
                steps[atom] = step
                at = torch.arange(digits.shape[dim]) // units[atom] % size * step
                counted = counted + at.reshape([-1 if d == dim else 1 for d in range(3)]).to(digits.dtype)
        ordered = sorted(steps, key=lambda a: -steps[a])
        inner = 1
        for atom in reversed(ordered):
            if steps[atom] != inner:
                return None
            inner *= sizes[atom]
        if inner != length or not torch.equal(counted, digits):
            return None
        axes.append(tuple(ordered))
    return tuple(axes)


def memory_order(axes: Axes) -> Atoms:
    """The atoms as they lie in memory, outermost first."""
    return tuple(a for axis in axes for a in axis)


def static_atoms(axes: Axes, shape: Sequence[object]) -> set[str]:
    """The atoms of the axes whose size is a number, not a symbol: their sizes are numbers too."""
    return {a for axis, size in zip(axes, shape, strict=True) if isinstance(size, int) for a in axis}


def sharing(axes: Axes, atoms: Collection[str]) -> Atoms:
    """Those that lie on one axis with one of these."""
    return tuple(a for axis in axes if set(axis) & set(atoms) for a in axis)


def aligned(shape: Sequence[object], axes: Axes) -> Axes:
    """Of what broadcasts against these axes, its own: none where its size is 1."""
    own = axes[len(axes) - len(shape) :]
    return tuple(() if is_one(size) else axis for size, axis in zip(shape, own, strict=True))


def is_one(size: object) -> bool:
    """Is the size the number 1, and no symbol?"""
    return isinstance(size, int) and size == 1
