"""When two floating-point results count as the same.

No fixed tolerance is right for logits: what rounding does to them depends on the depth, the width and the dtype. So
the model itself sets the bound. With E the eager result and W the same function evaluated in a wider dtype
(`fxfuse.parity.wide`), |E - W| is the rounding error that the user already accepts; another implementation that
rounds in other places may be wrong by as much, times a small factor, plus a few units in the last place::

    max |O - W|  <=  6 max |E - W|  +  32 ulp          one ulp is eps(dtype) times the RMS of W
    rms (O - W)  <=  3 rms (E - W)  +   4 ulp

The second line is the sharp one: a wrong mask or angle moves the RMS of all elements by far more than rounding does.
A ceiling on the relative RMS keeps out models whose own rounding error is so large that nothing could be told.

Without W (`wide=None`), E stands in for it, and the bounds are the fixed ones of `_FIXED`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

MAX_FACTOR, MAX_ULP = 6.0, 32.0
RMS_FACTOR, RMS_ULP = 3.0, 4.0

FEW = 16
"""Of fewer elements the RMS is no average: one unlucky rounding is all of it, and the first line has to do."""

_CEILING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Relative RMS error above which neither result says anything about the other."""

_FIXED = {
    torch.float64: (1e-9, 1e-10),
    torch.float32: (1e-3, 1e-4),
    torch.float16: (1e-2, 1e-3),
    torch.bfloat16: (8e-2, 8e-3),
}
"""Bounds on max and RMS error, relative to the RMS of the output, where no wide result is at hand."""


@dataclass(frozen=True)
class Result:
    """How far `other` is from `eager`, over all outputs, and whether that is rounding."""

    passed: bool
    dtype: str
    """What the model computes in: the unit of `max_ulp`."""
    max_abs: float
    """Largest |other - eager|."""
    max_rel: float
    """The same, relative to the RMS of that output."""
    max_ulp: float
    """The same, in units in the last place at that RMS."""
    own_ulp: float | None
    """Eager's own largest rounding error in these units; None if no wide result was given."""
    reason: str | None = None
    """Why it did not pass."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    eager: Sequence[torch.Tensor],
    other: Sequence[torch.Tensor],
    wide: Sequence[torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
    floor: float = 0.0,
) -> Result:
    """Compares the outputs of two implementations on the same inputs, output by output.

    Args:
        eager: what the original computes, in its own dtypes.
        other: what is to be judged; same shapes. Integer and bool outputs must be equal.
        wide: the original evaluated in a wider dtype: `fxfuse.parity.wide_outputs`.
        dtype: what the model computes in, where that is narrower than an output: `fxfuse.parity.working_dtype`.
            Many 16-bit models return float32 logits.
        floor: the least that an output's RMS counts for, where what cancels in it was larger: a gradient that is
            zero is as wrong as its terms are.

    Returns:
        The worst output's result; `reason` names the first output that failed.
    """
    if len(eager) != len(other):
        return _failed(f"{len(other)} outputs instead of {len(eager)}")
    worst: Result | None = None
    for index, (e, o) in enumerate(zip(eager, other, strict=True)):
        result = _compare_one(e, o, None if wide is None else wide[index], dtype, floor)
        if not result.passed:
            where = f"output {index}: " if len(eager) > 1 else ""
            return Result(**{**result.to_dict(), "reason": f"{where}{result.reason}"})
        if worst is None or result.max_ulp > worst.max_ulp:
            worst = result
    return worst or _failed("there are no outputs to compare")


def error_ulp(
    outputs: Sequence[torch.Tensor], wide: Sequence[torch.Tensor], dtype: torch.dtype, floor: float = 0.0
) -> float:
    """The largest error against `wide`, in units in the last place of `dtype` at that output's RMS (see `compare`)."""
    worst = 0.0
    for output, exact in zip(outputs, wide, strict=True):
        o, w = output.detach().cpu().double(), exact.detach().cpu().double()
        if o.shape != w.shape or not torch.equal(o.isfinite(), w.isfinite()):
            return math.inf
        if o.numel():
            error = float((o - w).abs().nan_to_num().max())
            worst = max(worst, error / (_eps(dtype) * (max(rms(w.nan_to_num()), floor) or 1.0)))
    return worst


def _compare_one(
    eager: torch.Tensor, other: torch.Tensor, wide: torch.Tensor | None, working: torch.dtype | None, floor: float
) -> Result:
    if eager.shape != other.shape:
        return _failed(f"shape {list(other.shape)} instead of {list(eager.shape)}")
    if not eager.is_floating_point():
        wrong = int((eager.cpu() != other.cpu()).sum())
        return _exact(eager.dtype) if not wrong else _failed(f"{wrong} of {eager.numel()} elements differ")
    if eager.numel() == 0:
        return _exact(eager.dtype)

    dtype = working if working is not None and _eps(working) > _eps(eager.dtype) else eager.dtype
    e, o = eager.detach().cpu().double(), other.detach().cpu().double()
    finite = e.isfinite()
    if not torch.equal(e[~finite].nan_to_num(), o[~finite].nan_to_num()) or not bool(o[finite].isfinite().all()):
        return _failed(f"{int((~o.isfinite()).sum())} elements are not finite; in eager {int((~finite).sum())}")
    if not bool(finite.any()):
        return _failed("eager has no finite element")
    w = (e if wide is None else wide.detach().cpu().double())[finite]
    e, o = e[finite], o[finite]

    scale = max(rms(w), floor) or 1.0
    ulp = _eps(dtype) * scale
    max_abs = float((o - e).abs().max())
    own_max, own_rms = float((e - w).abs().max()), rms(e - w)
    its_max, its_rms = float((o - w).abs().max()), rms(o - w)
    if wide is None:
        max_bound, rms_bound = (bound * scale for bound in _FIXED[dtype])
    else:
        max_bound = MAX_FACTOR * own_max + MAX_ULP * ulp
        rms_bound = RMS_FACTOR * own_rms + RMS_ULP * ulp if w.numel() >= FEW else max_bound
    ceiling = _CEILING[dtype] * scale

    reason = None
    if own_rms > ceiling:
        reason = f"eager's own rounding error is {own_rms / scale:.1e} of the output: nothing can be told from it"
    elif its_rms > min(rms_bound, ceiling):
        reason = f"RMS error {its_rms:.3g}, bound {min(rms_bound, ceiling):.3g} (eager's own: {own_rms:.3g})"
    elif its_max > max_bound:
        reason = f"max error {its_max:.3g}, bound {max_bound:.3g} (eager's own: {own_max:.3g})"
    return Result(
        passed=reason is None,
        dtype=str(dtype).removeprefix("torch."),
        max_abs=max_abs,
        max_rel=max_abs / scale,
        max_ulp=max_abs / ulp,
        own_ulp=None if wide is None else own_max / ulp,
        reason=reason,
    )


def _eps(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)


def rms(x: torch.Tensor) -> float:
    """The root of the mean of the squares."""
    return float(x.square().mean().sqrt())


def _exact(dtype: torch.dtype) -> Result:
    return Result(True, str(dtype).removeprefix("torch."), 0.0, 0.0, 0.0, None)


def _failed(reason: str) -> Result:
    return Result(False, "", math.inf, math.inf, math.inf, None, reason)
