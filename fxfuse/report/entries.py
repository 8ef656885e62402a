"""What a fusion run did, as plain data: it holds no nodes, so it can outlive, copy and pickle with its program.

Text, HTML and drawings are made from `Entries`; `fxfuse.report.model.Report` adds how they are shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fxfuse.proof.evidence import Evidence
from fxfuse.report.layer import Layer

Status = Literal["fused", "decomposed", "refused", "near miss"]
NOTED = "fxfuse_noted"
"""The key of a graph module's `meta` under which whoever captured a program leaves entries for its report."""


@dataclass(frozen=True)
class Entry:
    """One region of the graph and what became of it."""

    operator: str
    """The ONNX operator, or the user's own, that the region is or nearly is: ``"RMSNormalization"``."""
    status: Status
    nodes: tuple[str, ...]
    """Names of the original graph nodes in the region, in graph order; the output is last."""
    result: str | None = None
    """Name of the node that took its place (status ``fused`` or ``decomposed``)."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """The parameters that were measured on the region: ``{"epsilon": 1e-5}``."""
    reason: str | None = None
    """Why it was not fused: the property that failed, or the error that the proof saw."""
    source: str | None = None
    """The model's source line: ``"modeling.py:42: return x * cos"``."""
    module: str | None = None
    """Path of the innermost ``nn.Module``: ``"layers.0.sa_norm"``."""
    name: str | None = None
    """What `fuse(accept=…)` knows the refusal by: ``"clamp@model.py:12"``, or ``"attention@model.py:12"`` where no
    single call is to blame; the same in every run. None where it was fused, or where no one line is to blame."""
    evidence: Evidence | None = None
    """Why it is the same for every size, magnitude and value; None where nothing was fused, or not proven."""


@dataclass(repr=False)
class Entries:
    """All entries of one `fxfuse.fuse` call, in graph order, with counts and timings."""

    opset: int
    entries: list[Entry] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time by stage: ``propose``, ``recognise``, ``prove``, ``rewrite``, ``total``."""
    nodes_before: int = 0
    """`call_function` nodes before fusing."""
    nodes_after: int = 0
    layer: Layer | None = None
    """One layer before and after, for a drawing; None if nothing was fused."""

    def of(self, status: Status, operator: str | None = None) -> list[Entry]:
        """The entries with this status (and operator)."""
        return [e for e in self.entries if e.status == status and operator in (None, e.operator)]

    def fused(self, operator: str | None = None) -> list[Entry]:
        return self.of("fused", operator)

    def decomposed(self, operator: str | None = None) -> list[Entry]:
        """Replaced by primitives: exported, but not as one node."""
        return self.of("decomposed", operator)

    def refused(self, operator: str | None = None) -> list[Entry]:
        return self.of("refused", operator)

    def near_misses(self, operator: str | None = None) -> list[Entry]:
        return self.of("near miss", operator)

    @property
    def counts(self) -> dict[str, int]:
        """Fused regions by operator: ``{"RMSNormalization": 5, "Attention": 2}``."""
        return dict(Counter(e.operator for e in self.entries if e.status == "fused"))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def extend(self, entries: Iterable[Entry]) -> None:
        self.entries.extend(entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)
