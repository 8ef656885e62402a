"""Before the graph is touched, region and replacement run side by side on fresh inputs.

In float64, casts ignored: the same function. In the working dtype: the same rounding.
"""

from __future__ import annotations

import torch

from fxfuse.graph.region import Region
from fxfuse.graph.view import fake
from fxfuse.recognise.answers import Form, Found
from fxfuse.recognise.evaluate import CannotEvaluate, Evaluator
from fxfuse.recognise.questions import Questions
from fxfuse.recognise.sizes import PROFILES

EXACT_TOLERANCE = 1e-9
"""Largest float64 difference, relative to the output's size: summation order, never meaning."""
DRAWS = 2
"""Draws that must agree at least."""
DEFINED = 0.5
"""Share of the region's values that must be finite for a draw to count (rows masked whole may be nan)."""


class Refused(Exception):
    """Region and replacement differ, or could not be compared; the message says how."""


def prove(region: Region, found: Found, ask: Questions) -> Form:
    """The form of `found` that computes what the region computes and rounds most like it.

    Raises:
        Refused: no form does; the message has the error that was seen.
    """
    errors: list[str] = []
    best: tuple[float, Form] | None = None
    for form in found.forms:
        try:
            _same_function(region, found, form, ask)
            differing = _rounding(region, found, form, ask)
        except Refused as refused:
            errors.append(str(refused))
            continue
        if best is None or differing < best[0]:
            best = differing, form
        if differing == 0:
            break
    if best is None:
        raise Refused("; ".join(dict.fromkeys(errors)))
    return best[1]


def _same_function(region: Region, found: Found, form: Form, ask: Questions) -> None:
    compared = 0
    why = "no sizes could be evaluated"
    evaluators = [ask.evaluator(profile, alike=region.alike) for profile in range(PROFILES)]
    if region.beyond:
        evaluators.insert(0, ask.evaluator(0, alike=region.alike, preset=dict(region.beyond)))
    for profile, evaluator in enumerate(evaluators):
        if profile == len(evaluators) - 1 and compared >= DRAWS:
            break
        try:
            inputs = ask.inputs(region, evaluator, 100 + profile, from_leaves=found.from_leaves)
            results = evaluator.outputs(region, inputs)
        except CannotEvaluate as error:
            why = str(error)
            continue
        pairs = list(zip(results, _apply(form, inputs, len(results)), strict=True))
        for expected, actual in pairs:
            _same_shape(expected, actual)
        expected, actual = pairs[0]
        defined = expected.isfinite()
        if (defined | (expected == actual)).double().mean() < DEFINED or not defined.any():
            continue
        for expected, actual in pairs:
            _same_values(expected, actual)
        compared += 1
    if compared < DRAWS:
        raise Refused(f"could not be compared at {DRAWS} sets of sizes: {why}")


def _same_values(expected: torch.Tensor, actual: torch.Tensor) -> None:
    defined = expected.isfinite()
    if not defined.any():
        return
    difference = (actual - expected)[defined].abs().max().item()
    size = expected[defined].abs().max().item()
    if not difference <= EXACT_TOLERANCE * max(size, 1e-30):
        raise Refused(f"differs in float64 by {difference:.3g} where values are up to {size:.3g}")


def _rounding(region: Region, found: Found, form: Form, ask: Questions) -> float:
    """The share of values that differ from the region's in its own dtype, none by more than the operator's bound."""
    dtype = fake(region.output).dtype
    working = ask.evaluator(0, exact=False, alike=region.alike)
    try:
        inputs = ask.inputs(region, working, 200, from_leaves=found.from_leaves)
        results = working.outputs(region, inputs)
        references = _references(region, working, inputs)
    except CannotEvaluate as error:
        raise Refused(f"could not be run in {dtype}: {error}") from error
    results_and_ours = zip(results, references, _apply(form, inputs, len(results)), strict=True)
    return max(_differing(found, *values) for values in results_and_ours)


def _differing(found: Found, expected: torch.Tensor, reference: torch.Tensor, actual: torch.Tensor) -> float:
    """The share of values of one output that differ."""
    dtype = expected.dtype
    _same_shape(expected, actual)
    if actual.dtype != expected.dtype:
        raise Refused(f"gives {actual.dtype} for {expected.dtype}")
    defined = expected.isfinite() & reference.isfinite()
    actual, expected, reference = actual[defined], expected[defined], reference[defined]
    if not defined.any():
        raise Refused(f"gives nothing finite in {dtype}")
    unit = torch.finfo(dtype).eps * reference.abs().clamp(min=float(reference.square().mean().sqrt()) + 1e-30)
    off = ((actual.double() - expected.double()).abs() / unit).max().item()
    if found.averaging:
        theirs = ((expected.double() - reference).abs() / unit).max().item()
        ours = ((actual.double() - reference).abs() / unit).max().item()
        if not ours <= 2 * theirs + found.ulp:
            raise Refused(f"is {ours:.1f} ulp from float64 in {dtype}, the model's own code {theirs:.1f}")
        return 0.0
    differing = (actual != expected).double().mean().item()
    if not off <= found.ulp * (1 if torch.finfo(dtype).bits < 32 else 4):
        raise Refused(f"rounds differently in {dtype}: {differing:.0%} of values, up to {off:.1f} ulp")
    return differing


def _references(region: Region, working: Evaluator, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The region in float64 on the very values that were rounded to the working dtypes."""
    exact = Evaluator(working.sizes, exact=True)
    return exact.outputs(region, [t.to(exact.dtype(t.dtype)) for t in inputs])


def _apply(form: Form, inputs: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    try:
        with torch.no_grad():
            out = form(*inputs)
        results = list(out) if isinstance(out, tuple) else [out]
        if len(results) != count:
            raise Refused(f"the replacement gives {len(results)} values for {count}")
        return results
    except Refused:
        raise
    except Exception as error:  # the replacement is user code: whatever it raises is the proof's answer
        raise Refused(f"the replacement fails on the region's inputs: {type(error).__name__}: {error}") from error


def _same_shape(expected: torch.Tensor, actual: torch.Tensor) -> None:
    if not isinstance(actual, torch.Tensor) or actual.shape != expected.shape:
        shape = list(actual.shape) if isinstance(actual, torch.Tensor) else type(actual).__name__
        raise Refused(f"gives {shape} where the region gives {list(expected.shape)}")
    if not actual.isfinite()[expected.isfinite()].all():
        raise Refused("gives values that are not finite where the region's are")
