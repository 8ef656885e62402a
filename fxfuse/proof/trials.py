"""The draws of one region: what it gives for each, which pieces of its breaks ran, and what may be lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfuse.graph.region import Region
from fxfuse.graph.source import place_of
from fxfuse.graph.view import fake, op_name
from fxfuse.proof.accepted import accepted
from fxfuse.proof.breaks import Break, Breaks, coarse_casts
from fxfuse.proof.compare import NOISE, Refused, moved
from fxfuse.proof.draws import Variant, varied
from fxfuse.proof.evaluate import CannotEvaluate, Evaluator
from fxfuse.proof.evidence import BreakEvidence, Evidence
from fxfuse.proof.extents import Extents
from fxfuse.proof.positions.claims import counts_up, same_at_every_size
from fxfuse.proof.positions.decide import Holds
from fxfuse.proof.reach import unreachable
from fxfuse.proof.recorded import recorded

if TYPE_CHECKING:
    from fxfuse.recognise.answers import Form, Found
    from fxfuse.recognise.probe import Probe


@dataclass
class Trial:
    """One draw: what the region gives for it."""

    variant: Variant
    evaluator: Evaluator
    inputs: list[Tensor]
    results: list[Tensor]
    outside: str | None
    ran: frozenset[tuple[str, str]]
    """Breaks by name, and which of their pieces ran."""
    _loss: list[Tensor] | None = None
    _digits: list[Tensor] | None = None

    def loss(self, region: Region, place: int) -> Tensor:
        """What each element of a result may lose."""
        if self._loss is None:

            def run(sample: int) -> list[Tensor]:
                return self.evaluator.noisy(NOISE, sample).outputs(region, self.inputs)

            self._loss = moved(run, self.results)
        return self._loss[place]

    def digits(self, region: Region, place: int) -> Tensor:
        """How far each element moves where numbers are written with other digits, the same in float32."""
        if self._digits is None:

            def run(sample: int) -> list[Tensor]:
                return self.evaluator.with_other_digits(sample).outputs(region, self.inputs)

            self._digits = moved(run, self.results)
        return self._digits[place]


@dataclass
class Compared:
    """What one form was compared at."""

    trials: list[Trial] = field(default_factory=list)
    error: float = 0.0
    differences: list[str] = field(default_factory=list)


class Trials:
    """The draws of one region, which serve all forms; and what ran of its breaks in them."""

    def __init__(self, region: Region, found: Found, ask: Probe) -> None:
        self.region, self.found, self.ask = region, found, ask
        self.breaks = Breaks(ask.accept)
        self.extents = Extents(region, ask)
        self.equal: list[str] = []
        """Sizes that have to be equal for the region to run at all, as they are in the sample; in words."""
        self._done: dict[Variant, Trial | CannotEvaluate] = {}
        kinds = [fake(n).dtype for n in region.inputs]
        self._counts = any(not (k.is_floating_point or k.is_complex or k == torch.bool) for k in kinds)
        for node in () if found.read else region.others:
            _check_places(node, ask)
        for cast in _coarse_casts(region):
            name = f"{op_name(cast)}@{place_of(cast)}"
            if name not in ask.accept:
                kind = str(fake(cast).dtype).removeprefix("torch.")
                raise Refused(f"rounds to {kind} inside, more coarsely than its result ({name})")

    def run(self, variant: Variant, seed: int) -> Trial:
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

    def _run(self, variant: Variant, seed: int) -> Trial:
        region, found, ask = self.region, self.found, self.ask
        preset = dict(variant.large) or (
            dict(region.telling_sizes) if region.telling_sizes and variant.name == "ordinary" else None
        )
        evaluator = ask.evaluator(variant.profile, equal_sizes=region.equal_sizes, preset=preset)
        # First with whole numbers of any size; where one of them turns out to be an index, with small ones.
        for whole in (True, False) if self._counts else (False,):
            try:
                inputs = ask.inputs(region, evaluator, seed, from_leaves=found.from_leaves, whole=whole)
                inputs = varied(region, variant, inputs, not found.from_leaves, seed)
                self.breaks.start()
                evaluator.breaks = self.breaks
                results = evaluator.outputs(region, inputs)
                break
            except CannotEvaluate:
                evaluator.breaks = None
                if not whole:
                    raise
        if found.meaning is not None:
            recorded(found.meaning, inputs, self.breaks)
        evaluator.breaks = None
        outside = self.breaks.outside or _too_large(region, inputs)
        if any(r.numel() == 0 for r in results):
            outside = "nothing is computed of nothing"
        if outside is None and not any(bool(r.isfinite().any()) for r in results if r.is_floating_point()):
            outside = "nothing finite" if all(r.is_floating_point() for r in results) else None
        if outside is None:
            self.breaks.count()
            self.extents.note(evaluator)
        return Trial(variant, evaluator, inputs, results, outside, frozenset(self.breaks.ran))

    @property
    def inside(self) -> list[Trial]:
        """The draws so far that lie in the domain."""
        return [t for t in self._done.values() if isinstance(t, Trial) and t.outside is None]

    @property
    def needed(self) -> Iterator[tuple[Break, str]]:
        """Pieces that have not run yet, and that no rule says are unreachable."""
        for one, piece in self.breaks.missing:
            if unreachable(one, piece) is None:
                yield one, piece

    def numbers(self) -> list[float]:
        """Numbers that the region mentions, or reads from tensors of one element."""
        from fxfuse.recognise.literals import literals

        found = {v for v in literals(self.region) if abs(v) < 1e30}
        for trial in self._done.values():
            if isinstance(trial, Trial) and trial.variant.name == "ordinary":
                found |= {float(t) for t in trial.inputs if t.numel() == 1 and not t.is_complex()}
        return sorted(found)

    def evidence(self, compared: Compared, ulp: float, notes: list[str]) -> Evidence:
        done = []
        for one in self.breaks.found.values():
            ran = tuple(dict.fromkeys(piece for (piece, _), met in one.met.items() if bool(met.any())))
            beyond = {p: unreachable(one, p) or one.beyond.get(p, "") for p in _unmet(one)}
            done.append(BreakEvidence(one.name, ran, beyond))
            if one.fill is not None and self.found.averaging and one.name not in self.ask.accept:
                notes = [*notes, f"{one.name} masks with {one.fill:g}: for scores above it"]
        if self.found.floor is not None:
            notes = [*notes, *self.found.floor.said]
        trials = compared.trials
        overruled = accepted(self.region, self.breaks.found.values(), self.ask.accept)
        return Evidence(
            draws=len(trials),
            sizes=tuple({str(k): v for k, v in s} for s in dict.fromkeys(_sizes(t) for t in trials)),
            magnitudes=tuple(dict.fromkeys(abs(t.variant.magnitude) for t in trials)),
            breaks=tuple(done),
            claims=(
                *self.found.claims,
                *(f"{said} are equal, or the model fails" for said in dict.fromkeys(self.equal)),
            ),
            error=compared.error,
            rounding=ulp,
            differences=tuple(dict.fromkeys([*compared.differences, *notes, *overruled.values()])),
            accepted=tuple(sorted(overruled)),
        )


def _unmet(one: Break) -> list[str]:
    return [p for p in dict.fromkeys(piece for piece, _ in one.met) if p in one.beyond or p in one.missing]


def _check_places(node: Node, ask: Probe) -> None:
    """An index tensor in the region is either a permutation that is known, or counts in the same way at every length.

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


def _coarse_casts(region: Region) -> Iterator[Node]:
    """Casts on the way to an output that round more coarsely than it does."""
    for output in region.outputs:
        before = {output}
        for node in reversed(region.nodes):
            if node in before:
                before.update(node.all_input_nodes)
        yield from coarse_casts([n for n in region.nodes if n in before], fake(output).dtype)


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
    """Why a draw lies outside the domain: one of its values does not fit into the type that the model gives it."""
    for node, value in zip(region.inputs, inputs, strict=True):
        declared = fake(node).dtype
        if declared.is_floating_point and value.numel():
            finite = value[value.isfinite()]
            if finite.numel() and float(finite.abs().max()) > torch.finfo(declared).max:
                return f"{node.name} is larger than {declared} holds"
    return None


def _sizes(trial: Trial) -> tuple[tuple[Any, int], ...]:
    return tuple(sorted(((str(k), v) for k, v in trial.evaluator.sizes.chosen.items()), key=lambda item: item[0]))
