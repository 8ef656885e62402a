"""One fusion of one program: each pattern's regions are proposed, asked, proven and rewritten, and what became of each
is noted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

from torch.export import ExportedProgram
from torch.fx import Graph, Node

from fxfuse.graph.equal import merge_meeting, part
from fxfuse.graph.region import Region
from fxfuse.graph.source import module_path, source_line
from fxfuse.graph.splice import Guarded, Splicer, trace
from fxfuse.graph.view import GraphView
from fxfuse.proof.apart import ONE_DIM, groups, must_be_equal
from fxfuse.proof.evaluate import CannotEvaluate
from fxfuse.proof.evidence import Evidence
from fxfuse.proof.prove import Refused, prove
from fxfuse.proof.sizes import ties_of
from fxfuse.recognise.answers import NEAR, Found, Input, Pattern, Proposal, Reason
from fxfuse.recognise.questions import OutOfTime, Questions
from fxfuse.report.layer import mark
from fxfuse.report.model import Entry, Report
from fxfuse.report.refusals import failed, name_of, said
from fxfuse.suppose import Asking, Suppositions

T = TypeVar("T")


class Broken(Exception):
    """A rewrite that ended halfway."""

    def __init__(self, pattern: Pattern, entry: Entry) -> None:
        super().__init__(entry.reason)
        self.pattern, self.entry = pattern, entry


@dataclass
class Match:
    region: Region
    found: Found
    body: Traced


@dataclass(frozen=True)
class Traced:
    """A proven replacement."""

    graph: Graph
    evidence: Evidence | None


@dataclass
class Run:
    """One fusion of one program: answers and proofs are remembered by the shape of the region."""

    program: ExportedProgram
    report: Report
    verified: bool
    asking: Asking
    answers: dict[tuple[int, str], Found | Reason] = field(default_factory=dict)
    proofs: dict[tuple[int, str, str], Traced | str] = field(default_factory=dict)
    own: set[int] = field(default_factory=set)
    """Answers that hold for what this program's constants and positions are."""
    reading: tuple[GraphView, Questions] | None = None
    """What is known of the graph as it stands; None once it was rewritten."""
    ended: bool = False
    """Is the time over?"""
    outputs: set[Node] = field(default_factory=set)
    """Of the matches so far."""
    unsaid: list[Entry] | None = None
    """Where reasons go while the graph is matched as it stands, though equal values could be read as one."""
    unequal: set[Node] = field(default_factory=set)
    """Anchors at which something could not be run, each symbol having a size of its own."""
    said: dict[Node, list[Entry]] = field(default_factory=dict)
    """What was noted at each anchor."""

    def __post_init__(self) -> None:
        self.suppose = Suppositions(self.program, self.asking)

    def apply_twice(self, pattern: Pattern) -> None:
        """Match the graph as it stands, and then what is left of it with equal values of one formula read as one."""
        before = frozenset(self.program.graph.nodes)
        self.unsaid = []
        try:
            self.apply(pattern)
            held = self.unsaid
        finally:
            self.unsaid = None
        if self.ended:
            self.report.extend(held)
            return
        merged = merge_meeting(self.program.graph)
        self.reading = None
        self.apply(pattern, before)
        part(self.program.graph, merged)
        self.reading = None

    def apply(self, pattern: Pattern, anchors: frozenset[Node] | None = None) -> None:
        """Match the whole graph against one pattern, then rewrite it.

        Args:
            anchors: where regions may be; everywhere by default.
        """
        view, ask = self.reading = self.reading or (GraphView(self.program.graph), self.asking.of(self.program))
        matches: list[Match] = []
        taken: set[Node] = set()
        self.outputs.clear()
        self.unequal, self.said = set(), {}
        try:
            ask.check_time()
            for proposal in self._guarded(pattern, self._timed("propose", lambda: pattern.propose(view, ask))):
                ask.check_time()
                if proposal.anchor not in taken and (anchors is None or proposal.anchor in anchors):
                    match = self._decide(pattern, proposal, ask, taken)
                    if match is not None:
                        matches.append(match)
                        taken.update(match.region.computed)
                        self.outputs.update(match.region.outputs)
            if self.unequal:
                matches += self._as_in_the_sample(pattern, view, ask, taken)
        except OutOfTime:
            self.ended = True
            why = "the search ended here, and what comes after it was not looked for: its time was over (budget=…)"
            self._note(pattern, "near miss", (), None, reason=why)
        except Exception as error:  # what it proposes or answers is not what it should be
            self._note(pattern, "near miss", (), None, reason=failed(pattern, "failed", error))
        raised = ask.settled.get(("raised", id(pattern)))
        if not matches and raised is not None and ("ran", id(pattern)) not in ask.settled:
            why = f"the example raised {said(raised)} for every region"
            self._note(pattern, "near miss", (), None, reason=why)
        if not matches:
            return
        try:
            with self._clock("rewrite"):
                self._rewrite(matches)
            self.reading = None
        except Exception as error:
            why = failed(pattern, "failed while the graph was rewritten", error)
            raise Broken(pattern, self._note(pattern, "refused", (), None, reason=why)) from error

    @cached_property
    def ties(self) -> tuple[tuple[Any, Any], ...]:
        """Sizes that are equal in the sample."""
        return ties_of(self.program)

    def _may_be_about_sizes(self, answer: Reason, region: Region) -> bool:
        """Is it for sizes that are equal in the sample, and not here, that the region is nothing?"""
        return _is_about_sizes(answer.text) or bool(self.ties and answer.closeness and groups(region, self.ties))

    def _as_in_the_sample(self, pattern: Pattern, view: GraphView, ask: Questions, taken: set[Node]) -> Iterator[Match]:
        """What could not be run, asked once more: sizes are equal that are equal in the sample."""
        if not self.ties:
            return
        with ask.tied(self.ties):
            for proposal in self._guarded(pattern, self._timed("propose", lambda: pattern.propose(view, ask))):
                ask.check_time()
                if proposal.anchor not in self.unequal or proposal.anchor in taken:
                    continue
                earlier = self.said.pop(proposal.anchor, [])
                match = self._decide(pattern, proposal, ask, taken)
                later = self.said.pop(proposal.anchor, [])
                known = match is not None or any(ONE_DIM in str(entry.reason) for entry in later)
                superseded = earlier if known or not earlier else later
                self._notes[:] = [e for e in self._notes if all(e is not s for s in superseded)]
                if match is not None:
                    taken.update(match.region.computed)
                    self.outputs.update(match.region.outputs)
                    yield match

    def _decide(self, pattern: Pattern, proposal: Proposal, ask: Questions, taken: set[Node]) -> Match | None:
        """The best region around one anchor that is the operator and proves it; else why not."""
        found: list[tuple[Region, Found]] = []
        nearest: tuple[Reason, tuple[Node, ...]] | None = None
        near: list[tuple[int, Region]] = []
        if proposal.missed is not None:
            nearest = (proposal.missed, proposal.nodes or (proposal.anchor,))
        for region in self._guarded(pattern, self._timed("propose", lambda: proposal.regions), proposal.anchor):
            ask.check_time()
            if proposal.shares and region.output not in taken and not self.outputs & set(region.nodes):
                pass
            elif taken & region.computed:
                continue
            answer = self._recognise(pattern, region, ask)
            if isinstance(answer, Reason) and self._may_be_about_sizes(answer, region):
                self.unequal.add(proposal.anchor)
            if isinstance(answer, Found):
                found.append((region, answer))
                if region.closed and proposal.best_rank is not None and answer.rank >= proposal.best_rank:
                    body = self._prove(pattern, region, answer, ask)
                    if isinstance(body, Traced):
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
            body = self._prove(pattern, region, answer, ask)
            while isinstance(body, str) and answer.otherwise is not None:
                answer = answer.otherwise.after(f"as {answer.operator} it {body}")
                body = self._prove(pattern, region, answer, ask)
            if isinstance(body, Traced):
                return Match(region, answer, body)
            refusal = refusal or (body, region, answer)
        if refusal is not None:
            why, region, answer = refusal
            if _is_about_sizes(why):
                self.unequal.add(proposal.anchor)
            why = self.suppose.refused(pattern, region, ask, why, name_of("", why, None))
            self._note(
                pattern,
                "refused",
                region.nodes,
                proposal.anchor,
                reason=why,
                parameters=_named(answer.parameters, region),
            )
            return None
        regions = [region for _, region in sorted(near, key=lambda pair: -pair[0])]
        told = nearest is not None and nearest[0].closeness >= NEAR
        only = self.suppose(pattern, regions, ask, nearest[0].text if told and nearest else None)
        if only is not None:
            self._note(pattern, "near miss", regions[0].nodes, proposal.anchor, reason=only)
        elif told and nearest is not None:
            self._note(pattern, "near miss", nearest[1], proposal.anchor, reason=nearest[0].text)
        return None

    def _recognise(self, pattern: Pattern, region: Region, ask: Questions) -> Found | Reason:
        with self._clock("recognise"):
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

    def _prove(self, pattern: Pattern, region: Region, found: Found, ask: Questions) -> Traced | str:
        with self._clock("prove"):
            what = "decomposed" if found.decomposed is not None else found.operator
            general = (*_key(pattern, region, ask), what)
            if general in self.proofs and not found.from_leaves and id(found) not in self.own:
                return self.proofs[general]
            own = (*_own_key(pattern, region, ask), what)
            if own in self.proofs:
                return self.proofs[own]
            ask.read_leaves = found.from_leaves or id(found) in self.own
            result: Traced | str
            try:
                proof = prove(region, found, ask) if self.verified else None
                form = found.forms[0] if proof is None else proof.form
                result = Traced(trace(form, region.inputs), None if proof is None else proof.evidence)
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

    def _rewrite(self, matches: Iterable[Match]) -> None:
        splicer = Splicer(self.program)
        for match in matches:
            node = splicer.replace(match.region, match.body.graph)
            mark(node, len(self.report.entries), match.region.output)
            self.report.entries.append(
                Entry(
                    operator=match.found.operator,
                    name=name_of(match.found.operator, match.found.decomposed, match.region.output)
                    if match.found.decomposed is not None
                    else None,
                    status="fused" if match.found.decomposed is None else "decomposed",
                    reason=match.found.decomposed,
                    nodes=match.region.names,
                    result=node.name,
                    parameters=_named(match.found.parameters, match.region),
                    source=source_line(match.region.output),
                    module=module_path(match.region.output),
                    evidence=match.body.evidence,
                )
            )
        splicer.finish()

    def _note(
        self,
        pattern: Pattern,
        status: Literal["refused", "near miss"],
        nodes: Sequence[Node],
        anchor: Node | None,
        *,
        reason: str,
        parameters: dict[str, object] | None = None,
    ) -> Entry:
        entry = Entry(
            operator=str(pattern.operator),
            name=name_of(str(pattern.operator), reason, anchor),
            status=status,
            nodes=tuple(n.name for n in nodes),
            parameters=parameters or {},
            reason=reason,
            source=source_line(anchor) if anchor is not None else None,
            module=module_path(anchor) if anchor is not None else None,
        )
        self._notes.append(entry)
        if anchor is not None:
            self.said.setdefault(anchor, []).append(entry)
        return entry

    @property
    def _notes(self) -> list[Entry]:
        return self.report.entries if self.unsaid is None else self.unsaid

    def _guarded(self, pattern: Pattern, items: Iterator[T], anchor: Node | None = None) -> Iterator[T]:
        """Pass items on; where making one fails, say so and stop: a pattern must not take the export down."""
        try:
            yield from items
        except OutOfTime:
            raise
        except Exception as error:
            why = failed(pattern, "could not propose", error)
            nodes = (anchor,) if anchor is not None else ()
            self._note(pattern, "near miss", nodes, anchor, reason=why)

    @contextmanager
    def _clock(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.report.seconds[stage] = self.report.seconds.get(stage, 0.0) + time.perf_counter() - started

    def _timed(self, stage: str, make: Callable[[], Iterable[T]]) -> Iterator[T]:
        """Pass items on, counting the time it takes to make them."""
        with self._clock(stage):
            iterator = iter(make())
        while True:
            with self._clock(stage):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item


def _key(pattern: Pattern, region: Region, ask: Questions) -> tuple[int, str]:
    return id(pattern), f"{region.key}|as in the sample" if ask.ties else region.key


def _own_key(pattern: Pattern, region: Region, ask: Questions) -> tuple[int, str]:
    """For answers that hold for the values which these very inputs take in the program, or others computed alike."""
    own, key = _key(pattern, region, ask)
    return own, key + "|" + ",".join(ask.content(n) for n in region.others)


def _is_about_sizes(why: str) -> bool:
    """Could something not be run, be it for the sizes that were chosen?"""
    return any(
        part in why for part in ("cannot run at the probed sizes", "could not be asked", "could not be compared")
    )


def _named(parameters: dict[str, Any], region: Region) -> dict[str, Any]:
    """Parameters with the names of the tensors that they are."""

    def name(value: Any) -> Any:
        if callable(value):
            return value(region)
        if isinstance(value, list):
            return [name(v) for v in value]
        return region.inputs[value.position].name if isinstance(value, Input) else value

    return {key: name(value) for key, value in parameters.items()}
