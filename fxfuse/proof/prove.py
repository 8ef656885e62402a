"""Is the replacement the region, for every size, every magnitude and every value? Shown before the graph is touched.

1. *Analytic operators*: two compositions that agree on an open set agree everywhere, so a few draws prove them.
2. *Breaks* (clamp, where, floor, …): draws go on until each piece of each has run and was compared; a piece that never
   runs is unreachable by a named rule, or the fusion is refused and the break named.
3. *Sizes*: operators act alike at every size; those that do not (min, max, literal slices) are met on both sides.
4. *Positions* are not drawn at all: what is claimed of them was read and decided (`fxfuse.proof.positions.claims`).

Comparison is element by element, each against what its own arithmetic loses; then in the region's own type, no worse
than the region itself. The evidence is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from fxfuse.graph.region import Region
from fxfuse.graph.view import LOWERED, fake
from fxfuse.proof.apart import ONE_DIM, apart, groups, together
from fxfuse.proof.breaks import Break, masks
from fxfuse.proof.compare import Refused, same
from fxfuse.proof.draws import BASE, BELOW, GENTLE, Variant, at_numbers, searches
from fxfuse.proof.evaluate import CannotEvaluate
from fxfuse.proof.evidence import Evidence
from fxfuse.proof.floor import Floor
from fxfuse.proof.orders import EACH_PLACE, OTHER_NUMBERS
from fxfuse.proof.rounding import rounding
from fxfuse.proof.trials import Compared, Trial, Trials, run_form, same_shape

if TYPE_CHECKING:
    from fxfuse.recognise.answers import Form, Found
    from fxfuse.recognise.probe import Probe

Digits = Callable[[], torch.Tensor]
DRAWS = 2
"""At least at so many sets of sizes must region and form have been compared on ordinary numbers."""


@dataclass(frozen=True)
class Proof:
    """The form that was proven, and why it holds."""

    form: Form
    evidence: Evidence


def prove(region: Region, found: Found, ask: Probe) -> Proof:
    """The form of `found` that computes what the region computes and rounds most like it.

    Raises:
        Refused: no form does; the message has the break, or the error that was seen.
    """
    region = region.asked
    _check_lowered(region)
    trials = Trials(region, found, ask)
    errors: list[str] = []
    best: tuple[float, Proof] | None = None
    for form in found.forms:
        ask.check_time()
        try:
            compared = _proven(trials, form)
            rounded = rounding(region, found, form, ask)
        except Refused as refused:
            errors.append(str(refused))
            continue
        if best is None or rounded.differing < best[0]:
            evidence = trials.evidence(compared, rounded.ulp, rounded.notes)
            best = rounded.differing, Proof(form, evidence)
        if rounded.differing == 0:
            break
    if best is None:
        raise Refused("; ".join(dict.fromkeys(errors)))
    for what, form in found.also:
        try:
            _proven(trials, form)
        except Refused as refused:
            raise Refused(f"{what} {refused}") from None
    return best[1]


def _check_lowered(region: Region) -> None:
    """Raises: Refused: autocast computes it in a lower type, and what reads it may be in the model's own.

    There one operator and its parts differ by a rounding of the lower type, which is no rounding of the model's type.
    """
    kinds = [node.meta[LOWERED] for node in region.nodes if LOWERED in node.meta]
    if kinds:
        name = str(kinds[0]).removeprefix("torch.")
        raise Refused(
            f"torch.autocast computes it in {name} within a model of another type, where one operator rounds otherwise "
            f"than its parts do: export the model in {name}, or without autocast"
        )


def _proven(trials: Trials, form: Form) -> Compared:
    """Region and form in float64, at all magnitudes and sizes and on all pieces.

    Raises:
        Refused: they differ, or a piece of a break never ran.
    """
    compared = Compared()
    for trial in trials.inside:  # draws that were made for another form serve this one too
        _compare(trials, form, trial, compared)
    why = "no sizes could be evaluated"
    ordinary = 0
    for number, variant in enumerate(BASE):
        trials.ask.check_time()
        try:
            trial = trials.run(variant, 100 + number)
        except CannotEvaluate as error:
            why = str(error)
            continue
        _check_fills(trials)
        if trial.outside is None:
            _compare(trials, form, trial, compared)
            ordinary += 1
        else:
            why = trial.outside
    if ordinary < DRAWS:
        ordinary += _again(trials, form, compared)
    for number, variant in enumerate((*(BELOW if trials.found.averaging else ()), *at_numbers(trials.numbers()))):
        _try(trials, form, compared, variant, 150 + number)
    if ordinary < DRAWS:
        raise Refused(f"could not be compared at {DRAWS} sets of sizes: {why}")
    _search(trials, form, compared)
    _sizes_met(trials, form, compared)
    _all_met(trials)
    _apart(trials, form, compared)
    return compared


def _try(trials: Trials, form: Form, compared: Compared, variant: Variant, seed: int) -> bool:
    """Compare the two on this draw; False where the region cannot be run on it, or it lies outside the domain."""
    try:
        trial = trials.run(variant, seed)
    except CannotEvaluate:
        return False
    if trial.outside is None:
        _compare(trials, form, trial, compared)
    return trial.outside is None


def _again(trials: Trials, form: Form, compared: Compared) -> int:
    """Draw where ordinary draws could not be run: at sizes that are multiples, and at magnitudes small enough that half
    precision does not overflow."""
    return sum(_try(trials, form, compared, variant, 120 + n) for n, variant in enumerate(GENTLE))


def _search(trials: Trials, form: Form, compared: Compared) -> None:
    """Go on drawing, at likelier values first, for as long as some piece of a break has not run."""
    region = trials.region
    if not any(trials.needed):
        return
    for number, variant in enumerate(searches(len(region.sources), len(region.inputs), trials.numbers())):
        trials.ask.check_time()
        if _try(trials, form, compared, variant, 300 + number) and not any(trials.needed):
            return


def _sizes_met(trials: Trials, form: Form, compared: Compared) -> None:
    """Both sides of every bound that a size has.

    Raises:
        Refused: one of them cannot be run, and can be reached.
    """
    for number, preset in enumerate(trials.extents.wanted()):
        trials.ask.check_time()
        try:
            trial = trials.run(Variant(f"sizes {number}", large=preset), 500 + number)
        except CannotEvaluate as error:
            raise Refused(f"its sizes matter ({trials.extents.name}), and {error}") from error
        if trial.outside is None:
            _compare(trials, form, trial, compared)


def _apart(trials: Trials, form: Form, compared: Compared) -> None:
    """Sizes that were taken to be equal, made unequal.

    Raises:
        Refused: the region can be run there, and gives something else.
    """
    ask = trials.ask
    if not ask.ties:
        return
    for number, (variant, said) in enumerate(apart(trials.region, ask)):
        ask.check_time()
        with ask.tied(()):
            try:
                trial = trials.run(variant, 700 + number)
            except CannotEvaluate:
                continue
        if trial.outside is not None:
            continue
        try:
            _compare(trials, form, trial, compared)
        except Refused as refused:
            raise Refused(f"only where {said} are equal, as in the sample: {ONE_DIM} ({refused})") from refused
    for group in groups(trials.region, ask.ties):
        trials.equal.append(f"{together(group, ask)} are equal, or the model fails")


def _all_met(trials: Trials) -> None:
    """Raises: Refused: a piece that may run never did."""
    if (size := trials.extents.refused()) is not None:
        raise Refused(size)
    _check_fills(trials)
    for one, piece in trials.needed:
        if one.name not in trials.ask.accept:
            raise Refused(f"{_never(one, piece)} ({one.name})")


def _check_fills(trials: Trials) -> None:
    """Raises: Refused: scores are filled with a number that they may have themselves."""
    for one in trials.breaks.found.values():
        if trials.found.averaging and one.fill is not None and not masks(one) and one.name not in trials.ask.accept:
            raise Refused(
                f"fills scores with {one.fill:g}, a number that scores can reach: the operator only hides keys or adds "
                f"({one.name})"
            )


def _never(one: Break, piece: str) -> str:
    if piece == OTHER_NUMBERS:
        return f"computes {one.what} of numbers that are not known to be the same"
    if piece == EACH_PLACE:
        return f"computes {one.what}, and some place was never picked in any draw"
    if "of which nothing is known" in piece or piece in ("a search", "a power that varies"):
        return f"computes {one.what}, whose pieces cannot all be met"
    if piece in ("wrapped", "rounded"):
        return "counts in a narrow type, which holds only the first numbers exactly"
    return f"has a piece that no draw reached: {one.what} is never {piece}"


def _compare(trials: Trials, form: Form, trial: Trial, compared: Compared) -> None:
    """Raises: Refused: they differ there."""
    region, found = trials.region, trials.found
    results = run_form(form, trial.inputs, len(trial.results))
    for place, (expected, actual) in enumerate(zip(trial.results, results, strict=True)):
        same_shape(expected, actual)
        free = None if found.floor is None else found.floor.free(trial.inputs[0])
        if found.averaging and expected.is_floating_point():
            free = expected.isnan() & (actual == 0)
            if bool(free.any()):
                compared.differences.append("rows that see no key are nan in the model, 0 in the operator")
        try:
            wide = expected.is_floating_point() and fake(region.outputs[place]).dtype == torch.float64
            digits = None if wide else partial(trial.digits, region, place)
            if found.floor is not None:
                digits = partial(_hidden, found.floor, trial.inputs[0], expected, digits)
            error = same(expected, actual, partial(trial.loss, region, place), free=free, digits=digits)
        except Refused as refused:
            raise Refused(f"{refused}{_where(trials, trial, compared)}") from None
        compared.error = max(compared.error, error)
    if trial not in compared.trials:
        compared.trials.append(trial)


def _hidden(floor: Floor, x: torch.Tensor, result: torch.Tensor, digits: Digits | None) -> torch.Tensor:
    """By how much an element may differ because numbers are written with fewer digits, and because the model's bound is
    an epsilon in the operator."""
    off = floor.hides(x, result)
    return off if digits is None else off + digits()


def _where(trials: Trials, trial: Trial, compared: Compared) -> str:
    """At which inputs they differ, and on which piece of which break, if one ran there that does not run otherwise."""
    before = frozenset[tuple[str, str]]().union(*(t.ran for t in compared.trials))
    ordinary = next((t.ran for t in compared.trials if t.variant.name == "ordinary"), before)
    fresh = sorted(trial.ran - before) or sorted(trial.ran - ordinary)
    if fresh and compared.trials:
        name, piece = fresh[0]
        return f" where {name.partition('@')[0]} is {piece} ({name})"
    return f" (inputs: {trial.variant.name})" if trial.variant.name != "ordinary" else ""


__all__ = ["Proof", "Refused", "prove"]
