"""Where the boxes and lines of a drawing go: Graphviz's `dot`, through pygraphviz.

Why this library: the wheels of pygraphviz 2 carry Graphviz itself (Linux, macOS, Windows), so that pip installs all of
it and nothing is started; it is kept by the people of NetworkX, and `dot` draws clusters, which is what a fused region
is. Of what else pip installs, `graphviz` and `pydot` need the `dot` program, python-igraph is GPL and knows no
clusters, grandalf has had no release since 2023, and fast-sugiyama knows neither clusters nor the sizes of boxes.

Only positions come from Graphviz. It measures no text and reads no name that a user chose.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fxfuse.errors import FxfuseError
from fxfuse.report.layer import Call

CHARACTER, PADDING, HEIGHT, TITLE, MARGIN = 6.7, 14.0, 22.0, 15.0, 3.0
"""In pixels: the width of a character of the 11 px monospaced font, the space around a text, the height of a box, that
of a region's title, and the margin of the drawing."""
_INCH = 72.0
_LOCK = threading.Lock()  # Graphviz keeps its state in globals


@dataclass(frozen=True)
class Box:
    """A rectangle by its upper left corner, in pixels."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Line:
    """A smooth line: the start, then three points for every piece of cubic curve; `tip` is the arrow's end."""

    points: tuple[tuple[float, float], ...]
    tip: tuple[float, float]


@dataclass(frozen=True)
class Layout:
    """A drawing of one side of a layer."""

    width: float
    height: float
    calls: dict[str, Box]
    """The box of each call, by the call's name."""
    ports: dict[str, Box]
    """The box of each tensor that the calls read from outside, by name."""
    regions: dict[int, Box]
    """The box of each region, by the number of its entry in the report."""
    lines: tuple[Line, ...]


def available() -> bool:
    """Can anything be laid out here?"""
    try:
        _pygraphviz()
    except FxfuseError:
        return False
    return True


def lay_out(calls: Sequence[Call], titles: dict[int, str]) -> Layout:
    """Lay out a drawing of `calls`; those with one `Call.entry` stand together in a box below their title.

    Raises:
        FxfuseError: pygraphviz is not installed.
    """
    graph = _pygraphviz().AGraph(directed=True, strict=True, nodesep=0.14, ranksep=0.2)
    graph.node_attr.update(shape="box", label="", fixedsize=True, height=HEIGHT / _INCH)
    inside = {call.name for call in calls}
    ports = dict.fromkeys(name for call in calls for name in call.inputs if name not in inside)
    ids = {name: f"n{i}" for i, name in enumerate([*ports, *(call.name for call in calls)])}
    for name in ports:
        graph.add_node(ids[name], width=_width(shortened(name)) / _INCH)
    for call in calls:
        graph.add_node(ids[call.name], width=_width(call.label) / _INCH)
    for call in calls:
        for name in call.inputs:
            graph.add_edge(ids[name], ids[call.name])
    regions: dict[int, list[str]] = {}
    for call in calls:
        if call.entry is not None:
            regions.setdefault(call.entry, []).append(ids[call.name])
    for entry, nodes in regions.items():
        # An empty table of a fixed size reserves the place of the title. Graphviz would have to measure text, and needs
        # fonts.
        space = f'WIDTH="{_width(titles[entry]):.0f}" HEIGHT="{TITLE:.0f}"'
        label = f'<<TABLE FIXEDSIZE="TRUE" BORDER="0" {space}><TR><TD></TD></TR></TABLE>>'
        graph.add_subgraph(nodes, name=f"cluster_{entry}", label=label)
    with _LOCK:
        graph.layout(prog="dot")
    curves = [_curve(edge.attr["pos"]) for edge in graph.edges()]
    left, bottom, right, top = _numbers(graph.graph_attr["bb"])
    for x, y in (point for curve in curves for point in curve):  # a line may bulge out of the bounding box
        left, bottom, right, top = min(left, x), min(bottom, y), max(right, x), max(top, y)
    place = _Placement(left - MARGIN, top + MARGIN)
    return Layout(
        right - left + 2 * MARGIN,
        top - bottom + 2 * MARGIN,
        {call.name: place.node(graph.get_node(ids[call.name])) for call in calls},
        {name: place.node(graph.get_node(ids[name])) for name in ports},
        {entry: place.box(_numbers(graph.get_subgraph(f"cluster_{entry}").graph_attr["bb"])) for entry in regions},
        tuple(map(place.line, curves)),
    )


def shortened(name: str, limit: int = 24) -> str:
    """The end of a name says more than its beginning: ``"…_attn_pos_embeddings_cache"``."""
    return name if len(name) <= limit else "…" + name[1 - limit :]


@dataclass(frozen=True)
class _Placement:
    """Graphviz's coordinates grow upwards, SVG's downwards."""

    left: float
    top: float

    def node(self, node: Any) -> Box:
        x, y = _numbers(node.attr["pos"])
        width, height = float(node.attr["width"]) * _INCH, float(node.attr["height"]) * _INCH
        return self.box([x - width / 2, y - height / 2, x + width / 2, y + height / 2])

    def box(self, corners: list[float]) -> Box:
        left, bottom, right, top = corners
        return Box(left - self.left, self.top - top, right - left, top - bottom)

    def line(self, curve: list[list[float]]) -> Line:
        tip, *points = ((x - self.left, self.top - y) for x, y in curve)
        return Line(tuple(points), tip)


def _curve(position: str) -> list[list[float]]:
    """``"e,70,108 66,149 62,140 58,128 53,118"``: the arrow's tip, then the points of the curve."""
    return [_numbers(point) for point in position.removeprefix("e,").split()]


def _width(text: str) -> float:
    return len(text) * CHARACTER + PADDING


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def _pygraphviz() -> Any:
    try:
        import pygraphviz
    except ImportError as error:
        raise FxfuseError("pygraphviz is not installed", hint="pip install 'fxfuse[report]'") from error
    return pygraphviz
