"""Is the replacement the region, for every size, every magnitude and every value? Shown before the graph is touched.

1. *Analytic operators*: two compositions that agree on an open set agree everywhere, so a few draws prove them.
2. *Breaks* (clamp, where, floor, …): draws go on until each piece of each has run and was compared; a piece that never
   runs is unreachable by a named rule, or the fusion is refused and the break named.
3. *Sizes*: operators act alike at every size; those that do not (min, max, literal slices) are met on both sides.
4. *Positions* are not drawn at all: what is claimed of them was read and decided (`fxfuse.proof.claims`).

Comparison is element by element, each against what its own arithmetic loses; then in the region's own type, no worse
than the region itself. The evidence is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfuse.graph.region import Region
from fxfuse.graph.source import place_of
from fxfuse.graph.view import fake, op_name
from fxfuse.proof.accepted import accepted
from fxfuse.proof.breaks import Break, Breaks, coarse_casts, masks, unreachable
from fxfuse.proof.claims import counts_up, same_at_every_size
from fxfuse.proof.compare import NOISE, Refused, moved, same
from fxfuse.proof.decide import Holds
from fxfuse.proof.draws import BASE, BELOW, GENTLE, Variant, apply, at_numbers, searches
from fxfuse.proof.evaluate import CannotEvaluate, Evaluator
from fxfuse.proof.evidence import BreakEvidence, Evidence
from fxfuse.proof.extents import Extents
from fxfuse.proof.recorded import recorded
from fxfuse.proof.rounding import rounding

if TYPE_CHECKING:
    from fxfuse.recognise.answers import Form, Found
    from fxfuse.recognise.questions import Questions

DRAWS = 2
"""Sets of sizes at which ordinary numbers must have been compared, at least."""


@dataclass(frozen=True)
class Proof:
    """The form that was proven, and why it holds."""

    form: Form
    evidence: Evidence


def prove(region: Region, found: Found, ask: Questions) -> Proof:
    """The form of `found` that computes what the region computes and rounds most like it.

    Raises:
        Refused: no form does; the message has the break, or the error that was seen.
    """
    trials = _Trials(region, found, ask)
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
    return best[1]


@dataclass
class _Trial:
    """One draw: what the region gives for it."""

    variant: Variant
    evaluator: Evaluator
    inputs: list[Tensor]
    results: list[Tensor]
    outside: str | None
    ran: frozenset[tuple[str, str]]
    """Breaks by name, and which of their pieces ran."""
    _loss: list[Tensor] | None = None

    def loss(self, region: Region, place: int) -> Tensor:
        """What each element of a result may lose."""
        if self._loss is None:

            def run(sample: int) -> list[Tensor]:
                return self.evaluator.noisy(NOISE, sample).outputs(region, self.inputs)

            self._loss = moved(run, self.results)
        return self._loss[place]


@dataclass
class _Compared:
    """What one form was compared at."""

    trials: list[_Trial] = field(default_factory=list)
    error: float = 0.0
    differences: list[str] = field(default_factory=list)


class _Trials:
    """The draws of one region, which serve all forms; and what ran of its breaks in them."""

    def __init__(self, region: Region, found: Found, ask: Questions) -> None:
        self.region, self.found, self.ask = region, found, ask
        self.breaks = Breaks(ask.accept)
        self.extents = Extents(region, ask)
        self._done: dict[Variant, _Trial | CannotEvaluate] = {}
        for node in () if found.read else region.others:
            _check_places(node, ask)
        for cast in coarse_casts(region.nodes, fake(region.output).dtype):
            name = f"{op_name(cast)}@{place_of(cast)}"
            if name not in ask.accept:
                kind = str(fake(cast).dtype).removeprefix("torch.")
                raise Refused(f"rounds to {kind} inside, more coarsely than its result ({name})")

    def run(self, variant: Variant, seed: int) -> _Trial:
        """The region for one draw.

        Raises:
            CannotEvaluate: it cannot be run there.
        """
        known = self._done.get(variant)
        if known is None:
            try:
                known = self._run(variant, seed)
            except CannotEvaluate as error:
                known = error
            self._done[variant] = known
        if isinstance(known, CannotEvaluate):
            raise known
        return known

    def _run(self, variant: Variant, seed: int) -> _Trial:
        region, found, ask = self.region, self.found, self.ask
        preset = dict(variant.large) or (dict(region.beyond) if region.beyond and variant.name == "ordinary" else None)
        evaluator = ask.evaluator(variant.profile, alike=region.alike, preset=preset)
        inputs = ask.inputs(region, evaluator, seed, from_leaves=found.from_leaves)
        inputs = apply(variant, inputs, len(region.sources), not found.from_leaves, seed)
        self.breaks.start()
        self.extents.note(evaluator)
        evaluator.breaks = self.breaks
        results = evaluator.outputs(region, inputs)
        if found.meaning is not None:
            recorded(found.meaning, inputs, self.breaks)
        evaluator.breaks = None
        outside = self.breaks.outside or _too_large(region, inputs)
        if outside is None and not any(bool(r.isfinite().any()) for r in results if r.is_floating_point()):
            outside = "nothing finite" if all(r.is_floating_point() for r in results) else None
        return _Trial(variant, evaluator, inputs, results, outside, frozenset(self.breaks.ran))

    def numbers(self) -> list[float]:
        """Numbers that the region mentions, or reads from tensors of one element."""
        from fxfuse.recognise.literals import literals

        found = {v for v in literals(self.region) if abs(v) < 1e30}
        for trial in self._done.values():
            if isinstance(trial, _Trial) and trial.variant.name == "ordinary":
                found |= {float(t) for t in trial.inputs if t.numel() == 1 and not t.is_complex()}
        return sorted(found)

    def evidence(self, compared: _Compared, ulp: float, notes: list[str]) -> Evidence:
        done = []
        for one in self.breaks.found.values():
            ran = tuple(dict.fromkeys(piece for (piece, _), met in one.met.items() if bool(met.any())))
            beyond = {p: unreachable(one, p) or one.beyond.get(p, "") for p in _unmet(one)}
            done.append(BreakEvidence(one.name, ran, beyond))
            if one.fill is not None and self.found.averaging and one.name not in self.ask.accept:
                notes = [*notes, f"{one.name} masks with {one.fill:g}: for scores above it"]
        trials = compared.trials
        overruled = accepted(self.region, self.breaks.found.values(), self.ask.accept)
        return Evidence(
            draws=len(trials),
            sizes=tuple({str(k): v for k, v in s} for s in dict.fromkeys(_sizes(t) for t in trials)),
            magnitudes=tuple(dict.fromkeys(abs(t.variant.magnitude) for t in trials)),
            breaks=tuple(done),
            claims=self.found.claims,
            error=compared.error,
            rounding=ulp,
            differences=tuple(dict.fromkeys([*compared.differences, *notes, *overruled.values()])),
            accepted=tuple(sorted(overruled)),
        )


def _proven(trials: _Trials, form: Form) -> _Compared:
    """Region and form in float64, at all magnitudes and sizes and on all pieces.

    Raises:
        Refused: they differ, or a piece of a break never ran.
    """
    compared = _Compared()
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
    return compared


def _try(trials: _Trials, form: Form, compared: _Compared, variant: Variant, seed: int) -> bool:
    """Compare there, if it can be run there and lies in the domain."""
    try:
        trial = trials.run(variant, seed)
    except CannotEvaluate:
        return False
    if trial.outside is None:
        _compare(trials, form, trial, compared)
    return trial.outside is None


def _again(trials: _Trials, form: Form, compared: _Compared) -> int:
    """Sizes that must divide, and magnitudes at which half precision does not overflow."""
    return sum(_try(trials, form, compared, variant, 120 + n) for n, variant in enumerate(GENTLE))


def _search(trials: _Trials, form: Form, compared: _Compared) -> None:
    """Draw on while a piece of a break has not run."""
    region = trials.region
    if not any(_needed(trials)):
        return
    for number, variant in enumerate(searches(len(region.sources), len(region.inputs), trials.numbers())):
        trials.ask.check_time()
        if _try(trials, form, compared, variant, 300 + number) and not any(_needed(trials)):
            return


def _needed(trials: _Trials) -> Iterator[tuple[Break, str]]:
    for one, piece in trials.breaks.missing:
        if unreachable(one, piece) is None and not (one.what in ("where", "masked_fill") and not one.met):
            yield one, piece


def _sizes_met(trials: _Trials, form: Form, compared: _Compared) -> None:
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


def _all_met(trials: _Trials) -> None:
    """Raises: Refused: a piece that may run never did."""
    if (size := trials.extents.refused()) is not None:
        raise Refused(size)
    _check_fills(trials)
    for one, piece in _needed(trials):
        if one.name not in trials.ask.accept:
            raise Refused(f"{_never(one, piece)} ({one.name})")


def _check_fills(trials: _Trials) -> None:
    """Raises: Refused: scores are filled with a number that they may have themselves."""
    for one in trials.breaks.found.values():
        if trials.found.averaging and one.fill is not None and not masks(one) and one.name not in trials.ask.accept:
            raise Refused(
                f"fills scores with {one.fill:g}, a number that scores can reach: the operator only hides keys or adds "
                f"({one.name})"
            )


def _never(one: Break, piece: str) -> str:
    if "of which nothing is known" in piece or piece in ("a search", "a power that varies"):
        return f"computes {one.what}, whose pieces cannot all be met"
    if piece in ("wrapped", "rounded"):
        return "counts in a narrow type, which holds only the first numbers exactly"
    return f"has a piece that no draw reached: {one.what} is never {piece}"


def _unmet(one: Break) -> list[str]:
    return [p for p in dict.fromkeys(piece for piece, _ in one.met) if p in one.beyond or p in one.missing]


def _compare(trials: _Trials, form: Form, trial: _Trial, compared: _Compared) -> None:
    """Raises: Refused: they differ there."""
    region, found = trials.region, trials.found
    results = run_form(form, trial.inputs, len(trial.results))
    for place, (expected, actual) in enumerate(zip(trial.results, results, strict=True)):
        same_shape(expected, actual)
        free = None
        if found.averaging and expected.is_floating_point():
            free = expected.isnan() & (actual == 0)
            if bool(free.any()):
                compared.differences.append("rows that see no key are nan in the model, 0 in the operator")
        try:
            error = same(expected, actual, partial(trial.loss, region, place), free=free)
        except Refused as refused:
            raise Refused(f"{refused}{_where(trials, trial, compared)}") from None
        compared.error = max(compared.error, error)
    if trial not in compared.trials:
        compared.trials.append(trial)


def _where(trials: _Trials, trial: _Trial, compared: _Compared) -> str:
    """At which inputs they differ, and on which piece of which break, if it is one that had not run before."""
    before = frozenset[tuple[str, str]]().union(*(t.ran for t in compared.trials))
    fresh = sorted(trial.ran - before)
    if fresh and compared.trials:
        name, piece = fresh[0]
        return f" where {name.partition('@')[0]} is {piece} ({name})"
    return f" (inputs: {trial.variant.name})" if trial.variant.name != "ordinary" else ""


def _check_places(node: Node, ask: Questions) -> None:
    """What picks elements by their place is a permutation that is known, or counts alike at every length.

    Raises:
        Refused: at some length it may pick others.
    """
    kind = fake(node).dtype
    if kind.is_floating_point or kind.is_complex or kind == torch.bool or ask.depends_on_input(node):
        return
    if same_at_every_size(ask.reader, node) and _is_static(node):
        return
    if isinstance(counts_up(ask.reader, node), Holds):
        return
    place = place_of(node)
    raise Refused(f"picks elements by {node.name}, which goes on otherwise at other lengths ({op_name(node)}@{place})")


def _is_static(node: Node) -> bool:
    return all(isinstance(d, int) for d in fake(node).shape)


def run_form(form: Form, inputs: list[Tensor], count: int) -> list[Tensor]:
    """Raises: Refused: the replacement fails, or gives another number of values."""
    try:
        with torch.no_grad():
            out: Any = form(*inputs)
        results = list(out) if isinstance(out, tuple) else [out]
        if len(results) != count:
            raise Refused(f"the replacement gives {len(results)} values for {count}")
        return results
    except Refused:
        raise
    except Exception as error:  # the replacement is user code: whatever it raises is the proof's answer
        raise Refused(f"the replacement fails on the region's inputs: {type(error).__name__}: {error}") from error


def same_shape(expected: Tensor, actual: Any) -> None:
    """Raises: Refused: they have different shapes, or one is no tensor."""
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        shape = list(actual.shape) if isinstance(actual, Tensor) else type(actual).__name__
        raise Refused(f"gives {shape} where the region gives {list(expected.shape)}")


def _too_large(region: Region, inputs: list[Tensor]) -> str | None:
    """Inputs that their own type does not hold are no inputs."""
    for node, value in zip(region.inputs, inputs, strict=True):
        declared = fake(node).dtype
        if declared.is_floating_point and value.numel():
            finite = value[value.isfinite()]
            if finite.numel() and float(finite.abs().max()) > torch.finfo(declared).max:
                return f"{node.name} is larger than {declared} holds"
    return None


def _sizes(trial: _Trial) -> tuple[tuple[Any, int], ...]:
    return tuple(sorted(((str(k), v) for k, v in trial.evaluator.sizes.chosen.items()), key=lambda item: item[0]))


__all__ = ["Proof", "Refused", "prove", "run_form", "same_shape"]
