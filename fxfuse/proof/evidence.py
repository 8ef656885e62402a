"""What a proof rests on, as plain data: it is kept with the fused entry, and `fxfuse verify` finds it again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class BreakEvidence:
    """What the proof knows of one break: which of its pieces were compared, and why the others cannot run."""

    name: str
    """``"clamp@model.py:12"``"""
    pieces: tuple[str, ...]
    """The pieces that ran, each of them compared."""
    beyond: dict[str, str] = field(default_factory=dict)
    """The pieces that nothing can reach, each with the rule that says so."""


@dataclass(frozen=True)
class Evidence:
    """Why a region and its replacement are the same for every size, magnitude and value."""

    draws: int
    """Sets of inputs that were compared element by element."""
    sizes: tuple[dict[str, int], ...]
    """What the symbols of the region were."""
    magnitudes: tuple[float, ...]
    """The orders of magnitude that the inputs had."""
    breaks: tuple[BreakEvidence, ...] = ()
    claims: tuple[str, ...] = ()
    """What was read of positions and sizes, and how it was decided."""
    error: float = 0.0
    """Largest difference in float64, in units of what the arithmetic of that element may lose."""
    rounding: float = 0.0
    """Largest difference in the region's own type, in units in the last place."""
    differences: tuple[str, ...] = ()
    """Where the operator is documented to give something else than the model."""
    accepted: tuple[str, ...] = ()
    """Refusals that the caller overruled by name. For values beyond these bounds model and operator differ."""

    def __str__(self) -> str:
        """One line: ``"12 draws at 1e-06 … 1000, 3 sizes; breaks: clamp@m.py:3 (below, above); causal: z3"``."""
        numbers = sorted(self.magnitudes)
        spread = f" at {numbers[0]:g} … {numbers[-1]:g}" if numbers else ""
        parts = [f"{self.draws} draws{spread}, {len(self.sizes)} sizes, off by {self.error:.2g} of rounding"]
        if self.breaks:
            parts.append("breaks: " + ", ".join(_said(b) for b in self.breaks))
        parts.extend(self.claims)
        parts.extend(self.differences)
        said = " ".join(self.differences)
        if unsaid := [name for name in self.accepted if name not in said]:
            parts.append("accepted: " + ", ".join(unsaid))
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        from dataclasses import asdict

        return asdict(self)


def _said(one: BreakEvidence) -> str:
    beyond = [f"{piece} cannot be: {why}" for piece, why in one.beyond.items()]
    return f"{one.name} ({'; '.join([', '.join(one.pieces), *beyond] if one.pieces else beyond)})"
