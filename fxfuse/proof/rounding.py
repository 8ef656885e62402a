"""Does the replacement round as the region does? Both run in the region's own types."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxfuse.graph.region import Region
from fxfuse.graph.view import CAST, fake, op_name, tensor
from fxfuse.proof.analytic import MOVED
from fxfuse.proof.compare import Refused, moved
from fxfuse.proof.draws import ROWS, Variant, masked, varied
from fxfuse.proof.evaluate import CannotEvaluate, Evaluator

if TYPE_CHECKING:
    from fxfuse.recognise.answers import Form, Found
    from fxfuse.recognise.probe import Probe

_VARIANTS = (Variant("ordinary"), Variant("small", scale=1e-2), Variant("large", scale=30.0))
_WORSE = (2.0, 4.0)
"""How many times farther from the float64 result than the region an operator that orders its sums itself may be: first
on ordinary numbers; then on extreme ones, where a single weight that tips from 0 to 1 decides the result."""
_EMPTY_ROW = 64.0
"""By so many units in the last place may averages differ over a row that sees no key: both average all values."""


@dataclass
class Rounding:
    differing: float
    """The share of values that differ from the region's on ordinary numbers."""
    ulp: float
    """The largest difference, in units in the last place of what an element is computed from."""
    notes: list[str] = field(default_factory=list)
    """Documented differences that were met."""


def rounding(region: Region, found: Found, form: Form, ask: Probe) -> Rounding:
    """How far the form is from the region in its own type.

    Raises:
        Refused: farther than the operator's bound.
    """
    from fxfuse.proof.trials import run_form

    result = Rounding(0.0, 0.0)
    dtype = fake(region.output).dtype
    for number, variant in enumerate(_VARIANTS):
        ask.check_time()
        working = ask.evaluator(0, exact=False, equal_sizes=region.equal_sizes)
        try:
            inputs = ask.inputs(region, working, 200 + number, from_leaves=found.from_leaves)
            inputs = varied(region, variant, inputs, not found.from_leaves, 200 + number)
            results = working.outputs(region, inputs)
        except CannotEvaluate as error:
            if number:
                continue
            raise Refused(f"could not be run in {dtype}: {error}") from error
        if number and not all(bool(r.isfinite().all()) for r in results):
            continue  # the region itself overflows here, and there is no result to compare with
        ours = run_form(form, inputs, len(results))
        if all(_identical(theirs, mine) for theirs, mine in zip(results, ours, strict=True)):
            continue
        exact, units = _references(region, working, inputs)
        for expected, reference, unit, actual in zip(results, exact, units, ours, strict=True):
            share, off = _differing(found, expected, reference, unit, actual, _WORSE[number > 0])
            result.ulp = max(result.ulp, off)
            result.differing = max(result.differing, share) if number == 0 else result.differing
    if found.masks:
        _rows(region, found, form, ask, result)
    return result


def _identical(expected: Tensor, actual: Tensor) -> bool:
    alike = isinstance(actual, Tensor) and actual.dtype == expected.dtype and torch.equal(actual, expected)
    return alike and bool(expected.isfinite().all())


def _differing(
    found: Found, expected: Tensor, reference: Tensor, unit: Tensor, actual: Tensor, worse: float
) -> tuple[float, float]:
    """The share of values of one output that differ, and by how many units at most."""
    from fxfuse.proof.trials import same_shape

    dtype = expected.dtype
    same_shape(expected, actual)
    if actual.dtype != expected.dtype:
        raise Refused(f"gives {actual.dtype} for {expected.dtype}")
    if not dtype.is_floating_point:
        if bool((expected != actual).any()):
            raise Refused(f"gives other values in {dtype}")
        return 0.0, 0.0
    defined = expected.isfinite() & reference.isfinite()
    if not defined.any():
        raise Refused(f"gives nothing finite in {dtype}")
    if not bool(actual[defined].isfinite().all()):
        raise Refused(f"gives values in {dtype} that are not finite where the region's are")
    actual, expected, reference, unit = (t[defined] for t in (actual, expected, reference, unit))
    off = float(((actual.double() - expected.double()).abs() / unit).max())
    if found.averaging:
        theirs = float(((expected.double() - reference).abs() / unit).max())
        ours = float(((actual.double() - reference).abs() / unit).max())
        if not ours <= worse * theirs + found.ulp:
            raise Refused(f"is {ours:.1f} ulp from float64 in {dtype}, the model's own code {theirs:.1f}")
        return 0.0, ours
    differing = (actual != expected).double().mean().item()
    if not off <= found.ulp * (1 if torch.finfo(dtype).bits < 32 else 4):
        raise Refused(f"rounds differently in {dtype}: {differing:.0%} of values, up to {off:.1f} ulp")
    return differing, off


def _references(region: Region, working: Evaluator, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The region in float64 on the very values that were rounded to the working types; and one unit of each element:
    what it moves by when every step rounds as the working type does."""
    exact = Evaluator(working.sizes, exact=True)
    exact.accept = working.accept
    values = [t.to(exact.dtype(t.dtype)) for t in inputs]
    results = exact.outputs(region, values)
    dtype = fake(region.output).dtype
    eps = max((torch.finfo(kind).eps for kind in _computed_in(region)), default=0.0)
    spread = moved(lambda sample: exact.noisy(eps, sample).outputs(region, values), results)
    # What the narrowest type that flows in does not hold beside 1 is nothing: float16 has no number below 6e-8.
    kinds = [k for k in (dtype, *(fake(n).dtype for n in region.inputs)) if k.is_floating_point]
    tiny = max((torch.finfo(k).tiny * torch.finfo(k).eps for k in kinds), default=1.0)
    return results, [
        torch.maximum(eps * r.abs().nan_to_num(), s) + tiny if r.is_floating_point() else s
        for r, s in zip(results, spread, strict=True)
    ]


def _computed_in(region: Region) -> Iterator[torch.dtype]:
    """The floating-point types of the result and of everything on the way. The coarsest of them decides how much is
    lost."""
    for node in region.nodes:
        value = tensor(node)
        moves = op_name(node) in MOVED and op_name(node) != "getitem"
        if value is not None and value.dtype.is_floating_point and not moves and op_name(node) not in CAST:
            yield value.dtype
    if fake(region.output).dtype.is_floating_point:
        yield fake(region.output).dtype


def _rows(region: Region, found: Found, form: Form, ask: Probe, result: Rounding) -> None:
    """Rows that see no key give what the region gives, in its own type; or the difference is documented.

    Raises:
        Refused: they give something else.
    """
    from fxfuse.proof.trials import run_form

    dtype = fake(region.output).dtype
    floating = [p for p, _ in found.masks if fake(region.others[p]).dtype.is_floating_point]
    numbers = [float("-inf"), torch.finfo(dtype).min] if floating else [float("-inf")]
    for number in numbers:
        for seed, how in enumerate(ROWS):
            ask.check_time()
            working = ask.evaluator(seed % 2, exact=False, equal_sizes=region.equal_sizes)
            try:
                inputs = ask.inputs(region, working, 400 + seed, from_leaves=found.from_leaves)
                for n, (place, factor) in enumerate(found.masks):
                    at = len(region.sources) + place
                    if found.from_leaves and not ask.depends_on_input(region.others[place]):
                        continue  # the program fixes what this mask holds, so that no row can be emptied in it
                    hidden = _held(math.copysign(number, factor * number), inputs[at].dtype)
                    inputs[at] = masked(inputs[at], how, hidden, 410 + seed * 7 + n)
                (expected, *_), (actual, *_) = (
                    working.outputs(region, inputs),
                    run_form(form, inputs, len(region.outputs)),
                )
            except CannotEvaluate:
                continue
            _same_rows(expected, actual, result, f"{how}, {number:g}" if floating else how)


def _held(number: float, dtype: torch.dtype) -> float:
    """The number, or the nearest that the mask's type has: it may be narrower than the type of the scores."""
    if not dtype.is_floating_point or math.isinf(number):
        return number
    return min(max(number, torch.finfo(dtype).min), torch.finfo(dtype).max)


def _same_rows(expected: Tensor, actual: Tensor, result: Rounding, how: str) -> None:
    dtype = expected.dtype
    if torch.finfo(dtype).bits < 32:
        if not bool(actual.isfinite().all()):
            raise Refused(f"is not finite where a row sees no key ({how})")
        return
    nan = expected.isnan() & actual.isfinite()
    if bool(nan.any()):
        if not bool((actual[nan] == 0).all()):
            raise Refused(f"is {actual[nan][0]:.3g} where the model gives nan: a row that sees no key ({how})")
        result.notes.append("rows that see no key are nan in the model, 0 in the operator")
    known = expected.isfinite()
    if not bool(actual[known].isfinite().all()):
        raise Refused(f"is not finite where a row sees no key ({how})")
    if not bool(known.any()):
        return
    size = expected[known].abs() + expected[known].square().mean().sqrt()
    off = float(((actual - expected).abs()[known] / (size * torch.finfo(dtype).eps)).max())
    if off > _EMPTY_ROW:
        raise Refused(f"gives something else where rows see no key ({how}): up to {off:.3g} ulp")
