"""The report as text: a line for each operator, then what did not fuse and why, with equal cases told once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fxfuse.report.entries import Entries, Entry
from fxfuse.report.proven import lines as proofs


@dataclass(frozen=True)
class Tally:
    """One operator's row of the summary."""

    operator: str
    fused: int
    decomposed: int
    refused: int
    near_misses: int
    parameters: str
    """The parameters that all its fused regions have in common; those that differ are left out."""


@dataclass(frozen=True)
class Unfused:
    """Regions that were not fused for one reason, perhaps in every layer."""

    operator: str
    status: str
    reason: str
    count: int
    source: str | None
    module: str | None
    """Path of the module of the first of them."""
    nodes: tuple[str, ...]
    """Nodes of the first of them."""
    name: str | None = None
    """The name that `fuse(accept=…)` takes."""

    @property
    def where(self) -> str:
        """``"modeling.py:42: return x * cos; in layers.0.sa_norm; nodes mul_3 … to_4; named clamp@modeling.py:42"``."""
        nodes = " … ".join(dict.fromkeys((self.nodes[0], self.nodes[-1]))) if self.nodes else ""
        parts = (
            self.source,
            self.module and f"in {self.module}",
            nodes and f"nodes {nodes}",
            self.name and f"named {self.name}",
        )
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True)
class FusedLine:
    """Regions that one line of the model became, perhaps in every layer."""

    operator: str
    source: str | None
    parameters: str
    """The parameters that they have in common."""
    modules: tuple[str, ...]
    nodes: int
    """Nodes of the first of them."""
    count: int


def tallies(report: Entries) -> list[Tally]:
    """Rows by operator, in the order of first appearance."""
    rows = []
    for operator in dict.fromkeys(entry.operator for entry in report):
        fused = report.fused(operator)
        rows.append(
            Tally(
                operator,
                len(fused),
                len(report.decomposed(operator)),
                len(report.refused(operator)),
                len(report.near_misses(operator)),
                _common(fused),
            )
        )
    return rows


def unfused(report: Entries) -> list[Unfused]:
    """What was refused or nearly matched; the same line of the model failing for the same reason is one case."""
    groups: dict[tuple[str, str, str, str | None, str | None], list[Entry]] = {}
    for entry in report:
        if entry.status != "fused":
            key = (entry.operator, entry.status, entry.reason or "no reason was given", entry.source, entry.name)
            groups.setdefault(key, []).append(entry)
    return [
        Unfused(operator, status, reason, len(group), source, group[0].module, group[0].nodes, name)
        for (operator, status, reason, source, name), group in groups.items()
    ]


def fused_lines(report: Entries) -> list[FusedLine]:
    """What was fused, by operator and by the model's line that computes the result."""
    groups: dict[tuple[str, str | None], list[Entry]] = {}
    for entry in report.fused():
        groups.setdefault((entry.operator, entry.source), []).append(entry)
    return [
        FusedLine(
            operator,
            source,
            _common(group),
            tuple(dict.fromkeys(entry.module for entry in group if entry.module)),
            len(group[0].nodes),
            len(group),
        )
        for (operator, source), group in groups.items()
    ]


def render(report: Entries) -> str:
    """The whole report as plain text, for a terminal or a log.

    opset 24, 233 → 121 nodes in 0.84 s
    RMSNormalization   5 fused                          axis=-1, epsilon=1e-05
    RotaryEmbedding    3 fused  1 near miss             interleaved=1
    proven: RMSNormalization (×5): 6 draws at 1e-06 … 1000, 3 sizes, off by 0 of rounding
    …

    near miss: RotaryEmbedding, but cos and sin belong to different positions
      model.py:42: return x * cos; in layers.1.attn; nodes mul_3 … add_4; named rotaryembedding@model.py:42
    """
    seconds = report.seconds.get("total", 0.0)
    lines = [f"opset {report.opset}, {report.nodes_before} → {report.nodes_after} nodes in {seconds:.2f} s"]
    rows = tallies(report)
    if not rows:
        lines.append("nothing to fuse was found")
    width = max((len(row.operator) for row in rows), default=0)
    counts = [_counts(row) for row in rows]
    counts_width = max(map(len, counts), default=0)
    for row, count in zip(rows, counts, strict=True):
        lines.append(f"{row.operator:<{width}}  {count:<{counts_width}}  {row.parameters}".rstrip())
    lines.extend(proofs(report))
    for case in unfused(report):
        times = f" (×{case.count})" if case.count > 1 else ""
        lines += ["", f"{case.status}: {case.operator}{times}: {case.reason}"]
        if case.where:
            lines.append(f"  {case.where}")
    return "\n".join(lines)


def _counts(row: Tally) -> str:
    parts = [f"{row.fused} fused"]
    if row.decomposed:
        parts.append(f"{row.decomposed} decomposed")
    if row.refused:
        parts.append(f"{row.refused} refused")
    if row.near_misses:
        parts.append(f"{row.near_misses} near miss" + ("es" if row.near_misses > 1 else ""))
    return "  ".join(parts)


def _common(entries: Iterable[Entry]) -> str:
    entries = list(entries)
    if not entries:
        return ""
    shared = dict(entries[0].parameters)
    for entry in entries[1:]:
        shared = {name: value for name, value in shared.items() if entry.parameters.get(name) == value}
    return ", ".join(f"{name}={_short(value)}" for name, value in shared.items())


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
