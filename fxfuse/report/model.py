"""The report that `fxfuse.fuse` gives: its entries, and how a terminal and a notebook show them."""

from __future__ import annotations

from dataclasses import dataclass

from fxfuse.report.entries import Entries, Entry, Status
from fxfuse.report.text import render


@dataclass(repr=False)
class Report(Entries):
    """All entries of one `fxfuse.fuse` call, in graph order, with counts and timings.

    `str(report)` is the table a person reads, a notebook shows it with a drawing; `to_dict()` is the JSON form.
    """

    def __str__(self) -> str:
        return render(self)

    __repr__ = __str__  # of hundreds of entries a prompt wants no more than that

    def _repr_html_(self) -> str:
        from fxfuse.report.html import fragment  # here: Jinja is needed by notebooks alone

        return fragment(self)


__all__ = ["Entry", "Report", "Status"]
