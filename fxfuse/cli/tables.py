"""The tables that a command prints at its end."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fxfuse.cli.progress import Stages, human, peak_memory
from fxfuse.parity.eager import Check
from fxfuse.recognise.answers import Pattern
from fxfuse.recognise.declared import declared
from fxfuse.repair import Repaired
from fxfuse.report.model import Report
from fxfuse.report.proven import lines as proofs
from fxfuse.report.text import tallies, unfused


def show_report(console: Console, report: Report) -> None:
    """What was fused, and what was not and why."""
    rows = tallies(report)
    # This column is shown only where it is of use, so that the table fits into 80 characters.
    decomposed = any(row.decomposed for row in rows)
    table = _table(
        f"Fused at opset {report.opset}: {report.nodes_before} → {report.nodes_after} nodes",
        "operator",
        ("fused", *(["decomposed"] if decomposed else []), "refused", "near misses"),
        "parameters",
    )
    for row in rows:
        numbers = (row.fused, *([row.decomposed] if decomposed else []), row.refused, row.near_misses)
        counts = (str(count) if count else "–" for count in numbers)
        table.add_row(escape(row.operator), *counts, escape(row.parameters))
    console.print(table) if table.row_count else console.print("Nothing to fuse was found.")
    for line in proofs(report):
        console.print(line, markup=False, highlight=False)
    for case in unfused(report):
        times = f" ×{case.count}" if case.count > 1 else ""
        console.print(f"{case.status}: {case.operator}{times}: {case.reason}", markup=False, highlight=False)
        if case.where:
            console.print(f"  {case.where}", markup=False, highlight=False)


def show_checks(console: Console, checks: list[Check]) -> None:
    """Parity, a row per backend and shape.

    An ulp is one unit in the last place at the output's own magnitude. The column `own` says by how many ulps eager
    PyTorch's result is off through its own rounding.
    """
    table = _table("Against eager PyTorch", "backend", ("inputs", "max abs", "ulp", "own ulp"), "result")
    for check in checks:
        result = check.result
        table.add_row(
            check.backend,
            check.sizes,
            f"{result.max_abs:.2g}",
            f"{result.max_ulp:.3g}",
            "–" if result.own_ulp is None else f"{result.own_ulp:.3g}",
            "[green]same[/]" if result.passed else f"[red]{escape(result.reason or 'different')}[/]",
        )
    console.print(table)


def show_costs(console: Console, stages: Stages, sizes: dict[str, int]) -> None:
    """Where the time went, the peak memory by then, and the sizes of the files."""
    total = sum(stages.seconds.values())
    table = _table("Where the time went", "stage", ("seconds", "share", "peak memory by then"))
    for name, seconds in stages.seconds.items():
        table.add_row(name, f"{seconds:.1f}", f"{seconds / total:.0%}" if total else "–", human(stages.peaks[name]))
    table.add_row("total", f"{total:.1f}", "", human(peak_memory()))
    console.print(table)
    for name, size in sizes.items():
        console.print(f"{name}  {human(size)}", markup=False, highlight=False)


def show_repairs(console: Console, done: Repaired) -> None:
    """What was changed in a file, and what it was run against."""
    lines = [f"{what} (×{count})" for what, count in done.changes.items()]
    for line in lines or ["Nothing to repair was found; the file was written as it came."]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for run in done.runs:
        verdict = "compared with" if run.result is None else f"at most {run.result.max_abs:.2g} from"
        console.print(f"batch {run.batch}: {verdict} {run.against}", markup=False, highlight=False, soft_wrap=True)


def show_patterns(console: Console, patterns: list[Pattern]) -> None:
    """The catalogue."""
    table = _table("Patterns", "name", (), "operator", "what it is", "options")
    for pattern in patterns:
        summary = (pattern.__doc__ or "").strip().split("\n\n")[0]
        options = "\n".join(f"{one.flag} {'|'.join(one.values)}" for one in declared(pattern))
        what = " ".join(summary.split())
        table.add_row(*map(escape, (pattern.name, pattern.operator, what, options)))
    console.print(table)


def _table(title: str, first: str, numbers: tuple[str, ...], *rest: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right")
    for name in rest:
        table.add_column(name, overflow="fold")
    return table
