"""Many cells told in few lines: the worst error of each implementation, what failed, and what did not run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fxfuse.parity.cell import IMPLEMENTATIONS, Cell


@dataclass
class Row:
    """All cells of one subject in one type, and for a program at one shape."""

    subject: str
    dtype: str
    case: str
    cells: dict[str, list[Cell]] = field(default_factory=lambda: {name: [] for name in IMPLEMENTATIONS})

    @property
    def calls(self) -> int:
        """How many calls there were: each has an eager cell."""
        return len(self.cells["eager"])

    def worst(self, implementation: str) -> float | None:
        """The largest error in ulp; None if nothing ran."""
        return max((cell.ulp for cell in self.cells[implementation] if cell.ulp is not None), default=None)

    def ran(self, implementation: str) -> int:
        return sum(cell.ran for cell in self.cells[implementation])

    def failed(self, implementation: str) -> int:
        return sum(not cell.passed for cell in self.cells[implementation])


def rows(cells: Iterable[Cell]) -> list[Row]:
    """The cells by subject, type and (for programs) shape, in the order in which they came."""
    found: dict[tuple[str, str, str], Row] = {}
    for cell in cells:
        key = (cell.subject, cell.point["dtype"], cell.point.get("case", ""))
        row = found.setdefault(key, Row(*key))
        row.cells[cell.implementation].append(cell)
    return sorted(found.values(), key=lambda row: (row.case != "", row.subject, _order(found, row)))


def _order(found: dict[tuple[str, str, str], Row], row: Row) -> int:
    return list(found.values()).index(row)


def failures(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that failed."""
    return [cell for cell in cells if not cell.passed]


def notes(cells: Sequence[Cell]) -> Counter[tuple[str, str]]:
    """What there is to know of cells that did not fail, by implementation, and how often."""
    return Counter(
        (cell.implementation, ("ran " if cell.ran else "did not run: ") + cell.reason)
        for cell in cells
        if cell.passed and cell.reason
    )
