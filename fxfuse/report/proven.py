"""Why each fused operator computes the same: the evidence of all entries, with entries that rest on the same
together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fxfuse.proof.evidence import Evidence
from fxfuse.report.entries import Entries, Entry

LONGEST = 200
"""The most characters of a line."""


@dataclass(frozen=True)
class Proven:
    """Entries of one operator that were proven in the same way, perhaps in every layer."""

    operator: str
    count: int
    evidence: Evidence
    """Evidence that holds for all of them: the fewest draws, the largest errors."""
    sources: tuple[str, ...]

    @property
    def brief(self) -> str:
        """One line, without what was accepted."""
        kept = tuple(d for d in self.evidence.differences if d not in self.accepted)
        text = str(replace(self.evidence, differences=kept, accepted=()))
        return text if len(text) <= LONGEST else text[: LONGEST - 1].rstrip() + "…"

    @property
    def accepted(self) -> tuple[str, ...]:
        """What the caller accepted, each with where model and operator differ because of it."""
        return tuple(
            next((d for d in self.evidence.differences if d.startswith(f"accepted {name}:")), f"accepted {name}")
            for name in self.evidence.accepted
        )


def proven(report: Entries) -> list[Proven]:
    """By operator and by what the proof rests on, in the order of first appearance."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in report:
        if (evidence := entry.evidence) is not None:
            rests_on = (evidence.breaks, evidence.claims, evidence.differences, evidence.accepted)
            groups.setdefault((entry.operator, repr(rests_on)), []).append(entry)
    return [
        Proven(
            operator,
            len(group),
            _common([e.evidence for e in group if e.evidence is not None]),
            tuple(dict.fromkeys(e.source for e in group if e.source)),
        )
        for (operator, _), group in groups.items()
    ]


def lines(report: Entries) -> list[str]:
    """``"proven: Attention (×2): 6 draws at 1e-06 … 1000, 3 sizes, …"``, and what was accepted."""
    found = []
    for kind in proven(report):
        what = f"{kind.operator} (×{kind.count})" if kind.count > 1 else kind.operator
        found.append(f"proven: {what}: {kind.brief}")
        found.extend(f"{what}: {text}" for text in kind.accepted)
    return found


def _common(all_of: Iterable[Evidence]) -> Evidence:
    evidence = list(all_of)
    fewest = min(evidence, key=lambda e: e.draws)
    return replace(fewest, error=max(e.error for e in evidence), rounding=max(e.rounding for e in evidence))
