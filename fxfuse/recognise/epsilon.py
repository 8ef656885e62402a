"""What keeps a norm from dividing by 0: an epsilon under the root, or a bound that an epsilon can stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from fxfuse.graph.view import fake
from fxfuse.proof.evaluate import CannotEvaluate, draw, generator
from fxfuse.proof.floor import Floor
from fxfuse.recognise.answers import Reason
from fxfuse.recognise.normalisation import NormFunction
from fxfuse.recognise.probe import Probe

SMALLEST = 1e-6
"""Rows from here on have to come out the same: what the proof calls tiny."""
_EXACT = 2.0**-44
_CLOSE = 3


@dataclass(frozen=True)
class Epsilon:
    """What the operator adds under its root."""

    value: float
    floor: Floor | None = None
    """Where it stands for something else."""


def measure_epsilon(f: NormFunction, x: Node, scale: torch.Tensor, ask: Probe) -> Epsilon | Reason:
    """Solve (x·scale/y)² - mean(x²) for tiny x, where epsilon is not."""
    found = []
    tiny = draw(x, f.evaluator, generator(7))
    for magnitude in (3e-2, 1e-3, 1e-4):
        small = tiny * magnitude
        measured = (small * scale / f(small)).square() - small.square().mean(-1, keepdim=True)
        epsilon = measured.mean().item()
        if not torch.allclose(measured, torch.full_like(measured, epsilon), rtol=1e-3, atol=1e-12):
            return _bounded(f, tiny, scale, x, ask)
        found.append(epsilon)
    last = found[-1]
    moves = any(abs(e - last) > 1e-3 * abs(last) + 1e-12 for e in found)
    if abs(last) < 1e-15 and (small_one := _small(f, tiny, scale)) is not None:
        return Epsilon(small_one)
    # Without an epsilon 0 is 0 / 0; where it is 0, something keeps the root from being 0.
    clamped = abs(last) < 1e-15 and bool(f(torch.zeros_like(tiny)).isfinite().all())
    if moves or last < -1e-15 or clamped:
        return _bounded(f, tiny, scale, x, ask)
    return Epsilon(max(last, 0.0))


def _small(f: NormFunction, tiny: torch.Tensor, scale: torch.Tensor) -> float | None:
    """An epsilon that only rows as small as its root show, such as float64's own; None where there is none."""
    found = []
    for magnitude in (1e-7, 1e-8, 1e-10):
        small = tiny * magnitude
        found.append((small * scale / f(small)).square() - small.square().mean(-1, keepdim=True))
    epsilon = found[-1].mean().item()
    constant = all(torch.allclose(m, torch.full_like(m, epsilon), rtol=1e-5, atol=0.0) for m in found)
    return epsilon if constant and epsilon > 0 else None


def _bounded(f: NormFunction, rows: torch.Tensor, scale: torch.Tensor, x: Node, ask: Probe) -> Epsilon | Reason:
    """The epsilon whose operator has the same factor for rows near 0, if all others come out the same."""
    size = rows.square().mean(-1, keepdim=True).sqrt()
    rows = rows / torch.where(size > 0, size, 1.0)

    def factor(magnitude: float) -> float | None:
        """What a row of this root mean square is multiplied with; None where it is not one number."""
        found = f(rows * magnitude) / (rows * magnitude * scale)
        first = float(found.flatten()[0])
        return first if first > 0 and torch.allclose(found, torch.full_like(found, first), rtol=1e-9) else None

    near = [factor(m) for m in (1e-25, 1e-30)]
    at_zero = f(torch.zeros_like(rows))
    if None in near or near[0] is None or near[1] is None or abs(near[0] / near[1] - 1) > 1e-9 or bool(at_zero.any()):
        return Reason("RMSNorm, but what it divides by is not the root of the mean square and an epsilon", _CLOSE)
    bound = 1 / near[1]
    epsilon = max(bound**2, torch.finfo(torch.float32).tiny)  # a number of the operator's own type
    hidden = torch.finfo(fake(x).dtype).eps / 4
    below = exact = most = 0.0
    for power in range(100):
        magnitude = 2.0**-power
        known = factor(magnitude)
        off = float("inf") if known is None else abs((magnitude**2 + epsilon) ** -0.5 / known - 1)
        if off > _EXACT:
            exact = max(exact, 2 * magnitude)
        if off > hidden:
            below = max(below, 2 * magnitude)
        most = max(most, off)
    if below > SMALLEST:
        return Reason(
            f"RMSNorm, but what it divides by is kept from 0 by {bound:.2g} in another way than by an epsilon under "
            f"the root, which rows smaller than {below:.1g} (root mean square) show; add it to the mean square instead",
            _CLOSE,
        )
    kind = torch.finfo(fake(x).dtype)
    met = below > kind.tiny * kind.eps / rows.shape[-1] ** 0.5  # of the smallest row that is not 0
    floor = Floor(bound, below, exact, hidden, most, _zeros(f, x, ask), met)
    if ask.strict and floor.said:
        said = "; ".join(floor.said)
        return Reason(f"RMSNorm, but for its epsilon: {said} (without strict=True it is fused)", _CLOSE)
    return Epsilon(epsilon, floor)


def _zeros(f: NormFunction, x: Node, ask: Probe) -> str:
    """What a row of zeros gives in the model's own type, if not 0: its bound may round to 0 there."""
    working = ask.evaluator(0, exact=False)
    values = [ask.draws([n], working, 3)[0] for n in f.region.others]
    try:
        given = working.region(f.region, [torch.zeros(working.sizes.shape(x), dtype=fake(x).dtype), *values])
    except CannotEvaluate:
        return ""
    kind = str(fake(x).dtype).removeprefix("torch.")
    return "" if bool(given.isfinite().all()) else f"rows of 0 are nan in the model in {kind}, 0 in the operator"
