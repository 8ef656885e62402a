"""Are two results the same? Element by element, each against what its own arithmetic may lose.

How much that is, is measured: the region runs again with every intermediate value off by a random part of a rounding
(Monte Carlo arithmetic: Parker, https://web.cs.ucla.edu/~stott/mca/), and what an element moves by is what it may be
off. An element is never excused by a larger one elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NEGLIGIBLE = 2.0**-43
"""A relative difference in float64 that any two orders of one sum may have."""
FACTOR = 256.0
"""By how many times the loss that was measured two results may differ: another order of summation, or a scale that is
written otherwise, loses somewhat more than was seen."""
NOISE = 2.0**-36
"""The relative size of the disturbance that is put on intermediate values in order to see what float64 may lose."""
SAMPLES = 4
_SMALLEST = 1e-290


class Refused(Exception):
    """Region and replacement differ, or could not be compared; the message says how."""


@dataclass(frozen=True)
class Difference:
    """The largest one, of elements where both are defined."""

    error: float
    """In units of what that element may lose."""


def moved(run: Callable[[int], list[Tensor]], results: list[Tensor]) -> list[Tensor]:
    """How far each element of each result moves in a few runs that are each a little off."""
    spread = [torch.zeros(r.shape, dtype=torch.float64) for r in results]
    for sample in range(SAMPLES):
        for known, exact, noisy in zip(spread, results, run(sample), strict=True):
            difference = (noisy - exact).abs()
            torch.maximum(known, torch.where(difference.isfinite(), difference, 0.0).double(), out=known)
    return spread


def same(
    expected: Tensor,
    actual: Tensor,
    loss: Callable[[], Tensor],
    *,
    free: Tensor | None = None,
    digits: Callable[[], Tensor] | None = None,
) -> float:
    """The largest difference in units of what an element may lose.

    Args:
        loss: how far each element moves under `NOISE`; asked only where it matters.
        digits: how far each element moves where numbers are written with other digits that round to the same float32.
        free: elements that are not compared, where the operator is documented to give something else.

    Raises:
        Refused: an element differs by more, or is not finite where the other is.
    """
    if expected.is_complex():
        parts = [same(torch.view_as_real(expected), torch.view_as_real(actual), lambda: _twice(loss()), free=None)]
        return max(parts)
    if not expected.is_floating_point():
        differ = expected != actual
        if bool(differ.any()):
            at = _first(differ)
            raise Refused(f"gives {actual[at].item()} where the region gives {expected[at].item()}")
        return 0.0
    known = torch.ones(expected.shape, dtype=torch.bool) if free is None else ~free
    unlike = (
        known
        & ~((expected.isnan() & actual.isnan()) | (expected == actual))
        & ~(expected.isfinite() & actual.isfinite())
    )
    if bool(unlike.any()):
        at = _first(unlike)
        raise Refused(f"gives {actual[at].item():.3g} where the region gives {expected[at].item():.3g}")
    defined = known & expected.isfinite() & actual.isfinite()
    difference = torch.where(defined, (actual - expected).abs(), 0.0)
    small = NEGLIGIBLE * expected.abs().nan_to_num() + _SMALLEST
    if bool((difference <= small).all()):
        return float((difference / (small + _SMALLEST)).max()) if difference.numel() else 0.0
    allowed = small + FACTOR * loss() * (torch.finfo(torch.float64).eps / NOISE)
    if digits is not None and bool((difference > allowed).any()):
        allowed = allowed + 2 * digits()
    wrong = difference > allowed
    if bool(wrong.any()):
        at = _first(wrong & (difference / allowed == (difference / allowed)[wrong].max()))
        raise Refused(
            f"differs in float64: {actual[at].item():.9g} for {expected[at].item():.9g}, where rounding explains "
            f"{allowed[at].item():.2g}"
        )
    return float((difference / allowed).max())


def _twice(loss: Tensor) -> Tensor:
    return loss.unsqueeze(-1).expand(*loss.shape, 2)


def _first(where: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in where.nonzero()[0])
