"""Achieved bandwidth against size, and times beside each other, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(record: dict[str, Any], path: Path) -> None:
    """A panel for every operator that moves data: GB/s of each implementation, the copy's as a black line."""
    from matplotlib.figure import Figure

    rows = [row for row in record["rows"] if "GB/s" in row]
    subjects = list(dict.fromkeys(row["op"] for row in rows)) or ["nothing was measured"]
    figure = Figure(figsize=(5.2 * len(subjects), 4.4), layout="constrained")
    panels = figure.subplots(1, len(subjects), squeeze=False)[0]
    for panel, subject in zip(panels, subjects, strict=True):
        own = [row for row in rows if row["op"] == subject]
        names = list(dict.fromkeys(name for row in own for name in row["GB/s"] if name != "composite"))
        for name in names:
            points = sorted((row["bytes"], row["GB/s"][name]) for row in own if name in row["GB/s"])
            # One line would jump between shapes of the same size.
            panel.scatter(*zip(*points, strict=True), s=12, label=name, alpha=0.7)
        copies = record["copies"]
        panel.plot([c["bytes"] for c in copies], [c["GB/s"] for c in copies], "k-", lw=1, label="copy")
        panel.set_xscale("log", base=2)
        panel.set_title(subject, fontsize=10)
        panel.set_xlabel("bytes read and written")
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("GB/s")
    figure.suptitle(f"{record['device']}, {record['date'][:10]}", fontsize=10)
    figure.savefig(path, dpi=150)
