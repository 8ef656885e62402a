"""The errors as a picture: a panel for every subject, a dot for every call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from fxfuse.errors import FxfuseError
from fxfuse.parity.cell import IMPLEMENTATIONS, Cell

COLOURS = {"float32": "#1b6ca8", "float16": "#e07b39", "bfloat16": "#4c9f70"}
SHIFT = {"float32": -0.22, "float16": 0.0, "bfloat16": 0.22}


def plot(cells: Sequence[Cell], path: Path, title: str) -> None:
    """Writes the picture; the suffix says in which format.

    Raises:
        FxfuseError: matplotlib is not installed, or does not know the format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FxfuseError("matplotlib is not installed", where=str(path), hint="pip install 'fxfuse[plot]'") from error
    subjects = list(dict.fromkeys(cell.subject for cell in cells))
    columns = min(len(subjects), 4) or 1
    lines = math.ceil(len(subjects) / columns) or 1
    figure = Figure(figsize=(3.4 * columns, 2.9 * lines + 0.8), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for panel, subject in zip(panels, subjects, strict=False):
        for dtype, colour in COLOURS.items():
            found = [c for c in cells if c.subject == subject and c.point["dtype"] == dtype and c.ulp is not None]
            for marker, passed in (("o", True), ("x", False)):
                kept = [c for c in found if c.passed is passed]
                panel.scatter(
                    [IMPLEMENTATIONS.index(c.implementation) + SHIFT[dtype] for c in kept],
                    # Zero has no place on a logarithmic axis, and neither has infinity.
                    [min(max(c.ulp or 0.0, 1e-2), 1e7) for c in kept],
                    s=14 if passed else 40,
                    c=colour if passed else "#c01c28",
                    marker=marker,
                    alpha=0.5 if passed else 1.0,
                    linewidths=0 if passed else 1.5,
                    label=dtype if passed else None,
                )
        panel.set_title(subject, fontsize=9)
        panel.set_yscale("log")
        panel.set_xticks(range(len(IMPLEMENTATIONS)), IMPLEMENTATIONS, fontsize=7)
        panel.set_xlim(-0.5, len(IMPLEMENTATIONS) - 0.5)
        panel.grid(axis="y", alpha=0.3)
    for panel in panels:
        panel.set_axis_off()
    figure.supylabel("largest error against float64, in ulp (0 drawn at 0.01)", fontsize=9)
    figure.suptitle(title, fontsize=10)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise FxfuseError(f"matplotlib cannot write this: {error}", where=str(path), hint=".png or .svg") from error
