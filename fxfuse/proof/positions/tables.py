"""Constants that a program reads. They are looked at whole: one that counts (0, 1, 2, …) or is a triangle becomes a
term; an element of any other is an element of a table."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from fxfuse.proof.arithmetic import float_number
from fxfuse.proof.positions.terms import Term, Terms
from fxfuse.torch_seams import version_of

_LARGEST = 1 << 26
"""A constant of more elements than this is not looked at."""
_SPREAD = 1 << 12
"""An index that may be at more places than this is not tried place by place."""
_known: Any = WeakTensorKeyDictionary()
"""What was found out about a constant, and at which of its versions."""


def table_element(terms: Terms, name: str, value: torch.Tensor, index: tuple[Term, ...]) -> Term:
    """The element of a constant at this place: a number, a count, a triangle; or an element of the table `name`."""
    if all(i.number is not None for i in index) and not value.dtype.is_complex:
        return number(terms, value[tuple(int(i.args[0]) for i in index)].item())
    if value.dtype.is_complex:
        return terms.given(f"table {name}", index, "real")
    if (same := _one_of(value, index)) is not None:
        return number(terms, same)
    if value.numel() <= _LARGEST:
        version, known = _known.get(value, (-1, None))
        if known is None or version != version_of(value):
            known = _read(value.detach())
            _known[value] = version_of(value), known
        kind, *said = known
        if kind == "one":
            return number(terms, said[0])
        if kind == "counts":
            start, steps = said
            parts = [terms.scale(i, step) for i, step in zip(index, steps, strict=True) if step]
            return terms.add(terms.number(start), *parts)
        if kind == "triangle":
            (row, column), offset, low, high = said
            below = terms.at_most(terms.subtract(index[column], index[row]), terms.number(offset))
            return terms.choose(below, number(terms, low), number(terms, high))
    whole = not (value.dtype.is_floating_point or value.dtype.is_complex)
    return terms.given(f"table {name}", index, "bool" if value.dtype == torch.bool else "int" if whole else "real")


def _one_of(value: torch.Tensor, index: tuple[Term, ...]) -> Any:
    """The element, where it is one number for all that its index may be."""
    picked = value.detach()
    for axis, place in enumerate(index):
        places = spread(place)
        if places is None or not places or min(places) < 0 or max(places) >= value.shape[axis]:
            return None
        if len(places) > _SPREAD:
            return None
        picked = picked.index_select(axis, torch.tensor(places, device=value.device))
    flat = picked.reshape(-1)
    return flat[0].item() if bool((flat == flat[0]).all()) else None


def spread(place: Term) -> list[int] | None:
    """All values of an index that is a number, or counts by one bounded variable."""
    if place.number is not None:
        return [int(place.number)]
    constant, parts = (place.args[0], place.args[1]) if place.op == "sum" else (0, ((place, 1),))
    if len(parts) != 1 or parts[0][0].op != "variable":
        return None
    variable, factor = parts[0]
    low, high = variable.bounds
    if high - low > _SPREAD:
        return None
    return [constant + factor * n for n in range(int(low), int(high) + 1)]


def number(terms: Terms, value: Any) -> Term:
    """A constant as it stands in a tensor: floats that are whole are whole."""
    return float_number(terms, value) if isinstance(value, float) else terms.number(value)


def _read(value: torch.Tensor) -> tuple[Any, ...]:
    flat = value.reshape(-1)
    if not flat.numel():
        return ("table",)
    if bool((flat == flat[0]).all()):
        return "one", flat[0].item()
    if value.dtype != torch.bool and (found := _counts(value)) is not None:
        return "counts", *found
    return _triangle(value) or ("table",)


def _counts(value: torch.Tensor) -> tuple[int, tuple[int, ...]] | None:
    """Start and steps of a table that only counts."""
    if value.dtype.is_floating_point and not bool((value == value.round()).all()):
        return None
    origin = (0,) * value.dim()
    start = value[origin].item()
    if abs(start) >= 2**24:
        return None
    steps = []
    expected = torch.full((1,) * value.dim(), start, dtype=torch.float64)
    for axis, size in enumerate(value.shape):
        step = 0.0
        if size > 1:
            second = tuple(int(a == axis) for a in range(value.dim()))
            step = float(value[second].item()) - float(start)
        places = torch.arange(size, dtype=torch.float64).reshape([-1 if a == axis else 1 for a in range(value.dim())])
        expected = expected + step * places
        steps.append(int(step))
    return (int(start), tuple(steps)) if bool((value.double() == expected).all()) else None


def _triangle(value: torch.Tensor) -> tuple[Any, ...] | None:
    """Axes, offset and the two numbers of a triangle: the first up to the diagonal, the second beyond it."""
    axes = [a for a, size in enumerate(value.shape) if size > 1]
    if len(axes) != 2:
        return None
    square = value.reshape(value.shape[axes[0]], value.shape[axes[1]])
    low, high = square[-1, 0], square[0, -1]
    if bool(low == high):
        return None
    offset = int((square[0] == low).sum()) - 1
    if offset < 0:
        return None
    kept = torch.ones(square.shape, dtype=torch.bool).tril(offset)
    if bool((square[kept] == low).all()) and bool((square[~kept] == high).all()):
        return "triangle", tuple(axes), offset, low.item(), high.item()
    return None
