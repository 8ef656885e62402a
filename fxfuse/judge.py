"""Which region around one anchor is the operator and proves it; each kind of region is asked and proven once."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch.export import ExportedProgram
from torch.fx import Graph, Node

from fxfuse.graph.region import Region
from fxfuse.graph.splice import Guarded, trace
from fxfuse.notes import Notes, with_names
from fxfuse.proof.apart import groups, must_be_equal
from fxfuse.proof.evaluate import CannotEvaluate
from fxfuse.proof.evidence import Evidence
from fxfuse.proof.prove import Refused, prove
from fxfuse.proof.sizes import ties_of
from fxfuse.recognise.answers import NEAR, Found, Pattern, Proposal, Reason
from fxfuse.recognise.probe import OutOfTime, Probe
from fxfuse.report.refusals import failed, name_of
from fxfuse.suppose import Asking, Suppositions


@dataclass(frozen=True)
class Replacement:
    """What takes a region's place, as it was proven."""

    graph: Graph
    evidence: Evidence | None
    """None where nothing was to be proven."""


@dataclass
class Match:
    region: Region
    found: Found
    body: Replacement


@dataclass
class Judge:
    """Of one program: answers and proofs are remembered by the shape of the region."""

    program: ExportedProgram
    proving: bool
    asking: Asking
    notes: Notes
    answers: dict[tuple[int, str], Found | Reason] = field(default_factory=dict)
    proofs: dict[tuple[int, str, str], Replacement | str] = field(default_factory=dict)
    own: set[int] = field(default_factory=set)
    """Answers that hold for what this program's constants and positions are."""
    unequal: set[Node] = field(default_factory=set)
    """Anchors at which something could not be run, each symbol having a size of its own."""

    def __post_init__(self) -> None:
        self.suppose = Suppositions(self.program, self.asking)

    @cached_property
    def ties(self) -> tuple[tuple[Any, Any], ...]:
        """Sizes that are equal in the sample."""
        return ties_of(self.program)

    def decide(
        self, pattern: Pattern, proposal: Proposal, ask: Probe, taken: Set[Node], outputs: Set[Node]
    ) -> Match | None:
        """The best region around one anchor that is the operator and proves it; None where there is none, and why is
        noted.

        Args:
            taken: what earlier matches compute, which are not to overlap.
            outputs: what they give.
        """
        found: list[tuple[Region, Found]] = []
        nearest: tuple[Reason, tuple[Node, ...]] | None = None
        near: list[tuple[int, Region]] = []
        if proposal.missed is not None:
            nearest = (proposal.missed, proposal.nodes or (proposal.anchor,))
        regions = self.notes.timed("propose", lambda: proposal.regions)
        for region in self.notes.guarded(pattern, regions, proposal.anchor):
            ask.check_time()
            if proposal.shares and region.output not in taken and not outputs & set(region.nodes):
                pass
            elif taken & region.computed:
                continue
            answer = self.recognise(pattern, region, ask)
            if isinstance(answer, Reason) and self._may_be_about_sizes(answer, region):
                self.unequal.add(proposal.anchor)
            if isinstance(answer, Found):
                found.append((region, answer))
                if region.closed and proposal.best_rank is not None and answer.rank >= proposal.best_rank:
                    body = self.prove(pattern, region, answer, ask)
                    if isinstance(body, Replacement):
                        return Match(region, answer, body)
                continue
            if answer.closeness:
                near.append((answer.closeness, region))
            if nearest is None or answer.closeness > nearest[0].closeness:
                nearest = (answer, region.nodes)
        if not found and nearest is None and proposal.otherwise is not None:
            nearest = (proposal.otherwise, (proposal.anchor,))
        refusal: tuple[str, Region, Found] | None = None
        for region, answer in sorted(found, key=lambda pair: (not pair[0].closed, -pair[1].rank)):
            body = self.prove(pattern, region, answer, ask)
            while isinstance(body, str) and answer.otherwise is not None:
                answer = answer.otherwise.after(f"as {answer.operator} it {body}")
                body = self.prove(pattern, region, answer, ask)
            if isinstance(body, Replacement):
                return Match(region, answer, body)
            refusal = refusal or (body, region, answer)
        if refusal is not None:
            self._note_refusal(pattern, proposal, ask, *refusal)
        else:
            ordered = [region for _, region in sorted(near, key=lambda pair: -pair[0])]
            self._note_near_miss(pattern, proposal, ask, nearest, ordered)
        return None

    def _note_refusal(
        self, pattern: Pattern, proposal: Proposal, ask: Probe, why: str, region: Region, answer: Found
    ) -> None:
        """It was recognised, and could not be proven."""
        if _is_about_sizes(why):
            self.unequal.add(proposal.anchor)
        why = self.suppose.refused(pattern, region, ask, why, name_of("", why, None))
        parameters = with_names(answer.parameters, region)
        self.notes.note(pattern, "refused", region.nodes, proposal.anchor, reason=why, parameters=parameters)

    def _note_near_miss(
        self,
        pattern: Pattern,
        proposal: Proposal,
        ask: Probe,
        nearest: tuple[Reason, tuple[Node, ...]] | None,
        regions: list[Region],
    ) -> None:
        """No region is the operator; where one nearly is, that is worth saying.

        Args:
            nearest: the reason that is the closest to none, and the nodes that it is about.
            regions: those that share something with the operator, the closest first.
        """
        told = nearest is not None and nearest[0].closeness >= NEAR
        only = self.suppose(pattern, regions, ask, nearest[0].text if told and nearest else None)
        if only is not None:
            self.notes.note(pattern, "near miss", regions[0].nodes, proposal.anchor, reason=only)
        elif told and nearest is not None:
            self.notes.note(pattern, "near miss", nearest[1], proposal.anchor, reason=nearest[0].text)

    def recognise(self, pattern: Pattern, region: Region, ask: Probe) -> Found | Reason:
        """The pattern's answer; a pattern that fails gives a reason that says so."""
        with self.notes.clock("recognise"):
            for key in (_key(pattern, region, ask), _own_key(pattern, region, ask) if self.own else None):
                if key is not None and key in self.answers:
                    return self.answers[key]
            ask.read_leaves = False
            try:
                answer = pattern.recognise(region, ask)
                if not isinstance(answer, (Found, Reason)):
                    raise TypeError(f"it answered {answer!r}, neither Found nor Reason")
            except CannotEvaluate as error:
                answer = Reason(str(error))
            except OutOfTime:
                raise
            except Exception as error:  # a pattern (a user's, say) that fails must not take the export down
                answer = Reason(failed(pattern, "could not be asked", error), NEAR)
            if ask.read_leaves:
                key = _own_key(pattern, region, ask)
                self.own.add(id(answer))
            else:
                key = _key(pattern, region, ask)
            self.answers[key] = answer
            return answer

    def prove(self, pattern: Pattern, region: Region, found: Found, ask: Probe) -> Replacement | str:
        """What takes the region's place; or, in words, why it is not proven to compute the same."""
        with self.notes.clock("prove"):
            what = "decomposed" if found.decomposed is not None else found.operator
            general = (*_key(pattern, region, ask), what)
            if general in self.proofs and not found.from_leaves and id(found) not in self.own:
                return self.proofs[general]
            own = (*_own_key(pattern, region, ask), what)
            if own in self.proofs:
                return self.proofs[own]
            ask.read_leaves = found.from_leaves or id(found) in self.own
            result: Replacement | str
            try:
                proof = prove(region, found, ask) if self.proving else None
                form = found.forms[0] if proof is None else proof.form
                result = Replacement(trace(form, region.inputs), None if proof is None else proof.evidence)
            except Refused as why:
                result = str(why)
            except Guarded as why:
                result = must_be_equal(str(why), region, ask) or str(why)
            except CannotEvaluate as why:
                result = f"could not be compared: {why}"
            except OutOfTime:
                raise
            except Exception as error:  # whatever a pattern or its replacement does, the export goes on
                result = failed(pattern, "could not be compared", error)
            self.proofs[own if ask.read_leaves else general] = result
            return result

    def _may_be_about_sizes(self, answer: Reason, region: Region) -> bool:
        """Is it for sizes that are equal in the sample, and not here, that the region is nothing?"""
        return _is_about_sizes(answer.text) or bool(self.ties and answer.closeness and groups(region, self.ties))


def _key(pattern: Pattern, region: Region, ask: Probe) -> tuple[int, str]:
    return id(pattern), f"{region.key}|as in the sample" if ask.ties else region.key


def _own_key(pattern: Pattern, region: Region, ask: Probe) -> tuple[int, str]:
    """For answers that hold for the values which these very inputs take in the program, or others computed alike."""
    own, key = _key(pattern, region, ask)
    return own, key + "|" + ",".join(ask.content(n) for n in region.others)


def _is_about_sizes(why: str) -> bool:
    """Could something not be run, be it for the sizes that were chosen?"""
    return any(
        part in why for part in ("cannot run at the probed sizes", "could not be asked", "could not be compared")
    )
