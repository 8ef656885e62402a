"""Every notebook runs from top to bottom, and what is committed of it is what it shows today.

After a change that shows: ``jupyter execute --inplace notebooks/*.ipynb``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
pytestmark = pytest.mark.slow


def shown(notebook: Any) -> list[list[tuple[str, str]]]:
    """Of every code cell: the kinds of its outputs and their text, less what no two runs have in common.

    Warnings are of the machine: they name its folders. How far results are off is of its processor's rounding.
    """
    return [
        [
            (kind, re.sub(r"\d+\.\d+ s|\d(\.\d+)?e[-+]\d+|off by \S+ of rounding", "#", text))
            for output in cell.outputs
            if output.get("name") != "stderr"
            for kind, text in {output.output_type: output.get("text", ""), **output.get("data", {})}.items()
            if kind != "text/html"  # the same as text/plain, with a drawing
        ]
        for cell in notebook.cells
        # What a model says that was trained just now depends on the processor's rounding.
        if cell.cell_type == "code" and "varies" not in cell.metadata.get("tags", [])
    ]


def pictures(notebook: Any) -> int:
    texts = [o.data.get("text/html", "") for c in notebook.cells for o in c.get("outputs", []) if "data" in o]
    return sum("<svg" in text for text in texts)


def joined(cells: list[list[tuple[str, str]]]) -> list[list[tuple[str, str]]]:
    """Text that came in two pieces is the same as in one."""
    result = []
    for cell in cells:
        merged: list[tuple[str, str]] = []
        for kind, text in cell:
            if merged and kind == "stream" == merged[-1][0]:
                merged[-1] = (kind, merged[-1][1] + text)
            else:
                merged.append((kind, text))
        result.append(merged)
    return result


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_what_is_committed(path: Path, tmp_path: Path) -> None:
    committed = nbformat.read(path, as_version=4)
    nbformat.validate(committed)
    assert pictures(committed) >= 1, "a reader who does not run it sees the drawing too"
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert pictures(notebook) == pictures(committed)
    assert joined(shown(notebook)) == joined(shown(committed))


def test_there_are_notebooks() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]
