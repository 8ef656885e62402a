"""The report that `fxfuse.fuse` gives: its entries, and how a terminal and a notebook show them."""

from __future__ import annotations

from dataclasses import dataclass

from fxfuse.report.entries import Entries, Entry, Status
from fxfuse.report.text import render


@dataclass(repr=False)
class Report(Entries):
    """All entries of one `fxfuse.fuse` call, in graph order, with counts and timings.

    `str(report)` is the table that a person reads. A notebook shows it with a drawing. `to_dict()` is the JSON form.
    """

    def __str__(self) -> str:
        return render(self)

    __repr__ = __str__  # a dataclass would print hundreds of entries at the prompt

    def _repr_html_(self) -> str:
        from fxfuse.report.html import fragment  # imported here, because only notebooks need Jinja

        return fragment(self)


__all__ = ["Entry", "Report", "Status"]
