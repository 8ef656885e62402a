"""What a region is asked that may be a LayerNorm: where its scale and bias are, its epsilon, and why it is none."""

from __future__ import annotations

import torch
from torch import Tensor

from fxfuse.graph.region import Region
from fxfuse.recognise.answers import Reason
from fxfuse.recognise.literals import snap
from fxfuse.recognise.normalisation import NormFunction, Scale
from fxfuse.recognise.probe import Probe

_TOLD = 3


class LayerNormFunction(NormFunction):
    """The region as a function of x alone, with the bias that was found."""

    bias: Tensor

    def __init__(self, region: Region, ask: Probe, seed: int) -> None:
        super().__init__(region, ask, seed)
        self.bias = torch.zeros(())

    def less_mean(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)


def spread(x: Tensor, axes: int | tuple[int, ...] = -1) -> Tensor:
    """The standard deviation of each row."""
    return x.var(axes, correction=0, keepdim=True).sqrt()


def of_inputs(region: Region, f: list[LayerNormFunction], values: list[Tensor]) -> Scale | None:
    """Which input a vector is, or a multiple of and a constant more than; or the constant it is; else None."""
    numbers = f[0].numbers
    flat = torch.cat(values)
    if torch.allclose(flat, flat[:1].expand_as(flat), rtol=1e-7, atol=1e-9):
        return Scale(None, 1.0, snap(values[0][0].item(), region, known={*numbers, 1.0}, noise=1e-9))
    for index in f[0].free:
        drawn = [g.others[index].reshape(-1) for g in f]
        if any(d.numel() != v.numel() for d, v in zip(drawn, values, strict=True)):
            continue
        factor = (values[0] - values[1]) / (drawn[0] - drawn[1])
        offset = values[0] - factor * drawn[0]
        if _constant(factor) and _constant(offset):
            multiple = snap(factor.median().item(), region, known={*numbers, 1.0}, tolerance=1e-7)
            constant = snap(offset.median().item(), region, known={*numbers, 1.0}, tolerance=1e-7, noise=1e-8)
            return Scale(1 + index, multiple, constant)
    return None


def _constant(values: Tensor) -> bool:
    return torch.allclose(values, values[:1].expand_as(values), rtol=1e-5, atol=1e-5)


def measure_epsilon(f: LayerNormFunction, rows: Tensor, scale: Tensor) -> float | Reason:
    """Solve (d·scale / (y - bias))² - mean(d²) for tiny rows, d being the row less its mean."""
    under, beside = [], []
    for magnitude in (3e-2, 1e-3, 1e-4):
        d = f.less_mean(rows * magnitude)
        root = (d * scale / (f(rows * magnitude) - f.bias)).abs()
        under.append(root.square() - spread(d).square())
        beside.append(root - spread(d))
    epsilon = _one(under)
    if epsilon is not None and epsilon >= -1e-15:
        return epsilon if epsilon >= 1e-15 else 0.0
    if _one(beside) is not None:
        return Reason(
            "LayerNorm, but its epsilon is added to the standard deviation, outside of the root: add it to the "
            "variance instead",
            _TOLD,
        )
    return Reason("LayerNorm, but what it divides by is not the root of the variance and an epsilon", _TOLD)


def _one(values: list[Tensor]) -> float | None:
    """The one number that all of these are."""
    number = float(values[-1].mean())
    one = all(torch.allclose(v, torch.full_like(v, number), rtol=1e-3, atol=1e-12) for v in values)
    return number if one else None


def near_miss(f: LayerNormFunction, rows: Tensor) -> Reason:
    """A LayerNorm over other axes than the last or over one of any length, or none."""
    big = rows * 1e4
    y = f(big) - f.bias
    rank = big.dim()
    for first in range(rank):
        for last in range(first, rank):
            axes = tuple(range(first, last + 1))
            if all(big.shape[a] == 1 for a in axes):
                continue
            ratio = y * spread(big, axes) / (big - big.mean(axes, keepdim=True))
            if torch.isfinite(ratio).all() and torch.allclose(ratio, ratio.flatten()[0], rtol=1e-5):
                if axes == (rank - 1,):
                    return Reason(
                        "LayerNorm over the last axis, which has no fixed size (export it with this size fixed)", _TOLD
                    )
                where = f"axis {axes[0]}" if len(axes) == 1 else f"axes {', '.join(map(str, axes))} together"
                return Reason(
                    f"LayerNorm over {where} of {rank}, and only the last axis is looked at: bring them together in "
                    "the last axis first, and move the result back",
                    _TOLD,
                )
    return Reason("not a LayerNorm")
