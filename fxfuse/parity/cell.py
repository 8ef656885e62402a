"""How one implementation did on one call or one program: what the parity tables, plots and files are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fxfuse.parity.compare import compare, error_ulp

IMPLEMENTATIONS = ("eager", "composite", "triton", "onnxruntime")


@dataclass(frozen=True)
class Cell:
    """One implementation on one call of an operator, or on one program at one shape."""

    subject: str
    """The operator (``"rms_norm"``, ``"rms_norm backward"``) or the program (``"torchtune:llama3_2"``)."""
    point: dict[str, str]
    """Where in the matrix: ``{"dtype": "float16", "layout": "strided", ...}``."""
    implementation: str
    """One of IMPLEMENTATIONS."""
    ulp: float | None
    """Its largest error against float64, in units in the last place at the output's RMS; None if it did not run."""
    passed: bool
    """True also where it did not run."""
    reason: str | None = None
    """Why it failed, or why it did not run."""

    @property
    def ran(self) -> bool:
        return self.ulp is not None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        return {**asdict(self), "ulp": self.ulp if self.ulp is None or math.isfinite(self.ulp) else str(self.ulp)}

    def __str__(self) -> str:
        return f"{self.subject}[{', '.join(self.point.values())}], {self.implementation}"


def judged(
    subject: str,
    point: dict[str, str],
    implementation: str,
    outputs: Sequence[torch.Tensor],
    eager: Sequence[torch.Tensor],
    exact: Sequence[torch.Tensor],
    dtype: torch.dtype,
    floor: float = 0.0,
) -> Cell:
    """The cell of an implementation that gave `outputs`; `eager` and `exact` set the bounds (see `compare`)."""
    result = compare(eager, outputs, exact, dtype, floor)
    ulp = error_ulp(outputs, exact, dtype, floor)
    return Cell(subject, point, implementation, ulp, result.passed, result.reason)


def skipped(subject: str, point: dict[str, str], implementation: str, why: str) -> Cell:
    """The cell of an implementation that did not run."""
    return Cell(subject, point, implementation, None, True, why)
