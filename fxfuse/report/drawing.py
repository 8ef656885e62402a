"""One layer before and after fusing, as two SVGs. A region and the operator that it became share a number and a colour.

The SVGs need no style sheet and no identifiers: they draw with the text colour of whatever page they stand in, light or
dark, and any number of them can stand in one page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot

from fxfuse.report.entries import Entries
from fxfuse.report.layer import Call, Layer
from fxfuse.report.layout import Box, Line, lay_out, shortened

HUES = (28, 210, 150, 280, 345, 90, 185, 255, 55)
"""Hues in degrees, given to the operators in the order of the report's summary; the first few are far apart."""


@dataclass(frozen=True)
class Region:
    """The box around the nodes that became one operator (before), or around that operator (after)."""

    title: str
    """``"2 RotaryEmbedding"``; the number is the same before and after."""
    hue: int
    box: Box


@dataclass(frozen=True)
class Node:
    label: str
    tip: str
    """What the pointer shows: operator, shape and source line."""
    box: Box
    hue: int | None = None
    gone: bool = False
    """Was it computed before fusing, and is it needed by nobody afterwards?"""


@dataclass(frozen=True)
class Arrow:
    path: str
    head: str


@dataclass(frozen=True)
class Side:
    """One of the two SVGs."""

    title: str
    calls: int
    width: float
    height: float
    regions: tuple[Region, ...]
    nodes: tuple[Node, ...]
    ports: tuple[Node, ...]
    arrows: tuple[Arrow, ...]


def hues(report: Entries) -> dict[str, int]:
    """A colour for every operator."""
    operators = dict.fromkeys(entry.operator for entry in report)
    return {operator: HUES[i % len(HUES)] for i, operator in enumerate(operators)}


def sides(report: Entries, layer: Layer) -> tuple[Side, Side]:
    """The drawings before and after.

    Raises:
        FxfuseError: the library that lays them out is not installed.
    """
    last = {call.entry: i for i, call in enumerate(layer.before) if call.entry is not None}
    entries = sorted(last, key=last.__getitem__)
    titles = {entry: f"{i} {report.entries[entry].operator}" for i, entry in enumerate(entries, 1)}
    colours = {entry: hues(report)[report.entries[entry].operator] for entry in entries}
    kept = {call.name for call in layer.after}
    return (
        _side("Before", layer.before, titles, colours, kept),
        _side("After", layer.after, titles, colours, kept),
    )


def _side(title: str, calls: Sequence[Call], titles: dict[int, str], colours: dict[int, int], kept: set[str]) -> Side:
    layout = lay_out(calls, titles)
    return Side(
        title,
        len(calls),
        layout.width,
        layout.height,
        tuple(Region(titles[entry], colours[entry], box) for entry, box in layout.regions.items()),
        tuple(
            Node(
                call.label,
                "\n".join(part for part in (f"{call.name} = {call.operator}", call.shape, call.source) if part),
                layout.calls[call.name],
                None if call.entry is None else colours[call.entry],
                gone=call.entry is None and call.name not in kept,
            )
            for call in calls
        ),
        tuple(Node(shortened(name), f"{name}, from outside", box) for name, box in layout.ports.items()),
        tuple(map(_arrow, layout.lines)),
    )


def _arrow(line: Line) -> Arrow:
    """A line as an SVG path, and a small triangle at its tip."""
    start, *rest = line.points
    path = f"M{_point(start)}C" + " ".join(map(_point, rest))
    (x, y), (tip_x, tip_y) = rest[-1], line.tip
    length = hypot(tip_x - x, tip_y - y) or 1.0
    right_x, right_y = -(tip_y - y) / length * 2.5, (tip_x - x) / length * 2.5
    corners = ((tip_x, tip_y), (x + right_x, y + right_y), (x - right_x, y - right_y))
    return Arrow(path, " ".join(map(_point, corners)))


def _point(point: tuple[float, float]) -> str:
    return f"{point[0]:.1f},{point[1]:.1f}"
