"""The report as HTML: a page of its own, and what a notebook shows. Nothing is fetched, and no script runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fxfuse.report.drawing import hues, sides
from fxfuse.report.entries import Entries
from fxfuse.report.layout import available
from fxfuse.report.proven import proven
from fxfuse.report.text import fused_lines, tallies, unfused


def page(
    report: Entries,
    title: str,
    *,
    checks: Sequence[Any] = (),
    seconds: Mapping[str, float] | None = None,
    facts: Mapping[str, str] | None = None,
) -> str:
    """A whole page, in light or dark as the reader's system has it.

    Args:
        report: what fusing did.
        title: what was fused.
        checks: comparisons with eager, each with `backend`, `sizes` and `result`.
        seconds: wall time of the whole run by stage.
        facts: versions and sizes for the last line.
    """
    return _render(
        "page.html",
        title=title,
        style=_style(),
        body=_body(report, level=2, opened=True),
        checks=list(checks),
        seconds=dict(seconds or {}),
        facts=dict(facts or {}),
    )


def fragment(report: Entries) -> str:
    """A `div` with its own style, for a cell of a notebook."""
    body = _body(report, level=3, opened=False)
    return f'<div class="fxfuse"><style>\n{_style()}</style>\n{body}</div>'


def _body(report: Entries, *, level: int, opened: bool) -> Markup:
    drawings = []
    if report.layer is not None and available():
        drawings = [(side, _render("drawing.svg", side=side)) for side in sides(report, report.layer)]
    return _render(
        "report.html",
        report=report,
        level=level,
        opened=opened,
        tallies=tallies(report),
        unfused=unfused(report),
        fused_lines=fused_lines(report),
        proven=proven(report),
        hues=hues(report),
        drawings=drawings,
    )


def _partition(source: str) -> tuple[str, str, str]:
    """``"model.py:42 in forward"`` and ``"return x * cos"``."""
    return source.partition(": ")


def _bars(seconds: Mapping[str, float]) -> Markup:
    return _render("bars.html", seconds=seconds)


def _render(template: str, **values: Any) -> Markup:
    return Markup(_environment().get_template(template).render(**values))


def _style() -> Markup:
    """The style sheet. It is our own file and holds no text of a user's, so it need not be escaped."""
    return _render("style.css")


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fxfuse.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = "{:.3g}".format
    environment.globals |= {"partition": _partition, "bars": _bars}
    return environment
