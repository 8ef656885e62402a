"""One fusion of one program: each pattern prepares it, and its regions are proposed, judged and rewritten."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch.export import ExportedProgram
from torch.fx import Node

from fxfuse.graph.equal import merge_meeting, part
from fxfuse.graph.source import module_path, source_line
from fxfuse.graph.splice import Splicer
from fxfuse.graph.view import GraphView
from fxfuse.judge import Judge, Match
from fxfuse.notes import Notes, with_names
from fxfuse.proof.apart import ONE_DIM
from fxfuse.recognise.answers import Pattern, Prepares, Proposal
from fxfuse.recognise.probe import OutOfTime, Probe
from fxfuse.report.layer import mark
from fxfuse.report.model import Entry, Report
from fxfuse.report.refusals import failed, name_of, said
from fxfuse.suppose import Asking


class Broken(Exception):
    """A pattern failed halfway through a change of the graph."""

    def __init__(self, pattern: Pattern, entry: Entry) -> None:
        super().__init__(entry.reason)
        self.pattern, self.entry = pattern, entry


@dataclass
class Run:
    """Of one program, which is changed in place."""

    program: ExportedProgram
    report: Report
    proving: bool
    """Is every rewrite proven before it is done?"""
    asking: Asking
    reading: tuple[GraphView, Probe] | None = None
    """What is known of the graph as it stands; None once it was rewritten."""
    ended: bool = False
    """Is the time over?"""
    outputs: set[Node] = field(default_factory=set)
    """Of the matches so far."""

    def __post_init__(self) -> None:
        self.notes = Notes(self.report)
        self.judge = Judge(self.program, self.proving, self.asking, self.notes)

    def prepare(self, pattern: Pattern) -> None:
        """Let a pattern that wants to make the program ready.

        Raises:
            Broken: it failed.
        """
        if not isinstance(pattern, Prepares):
            return
        try:
            pattern.prepare(self.program, self.asking.of(self.program))
        except Exception as error:
            why = failed(pattern, "failed while it made the program ready", error)
            raise Broken(pattern, self.notes.note(pattern, "refused", (), None, reason=why)) from error

    def apply_twice(self, pattern: Pattern) -> None:
        """Match the graph as it stands, and then what is left of it with equal values of one formula read as one."""
        before = frozenset(self.program.graph.nodes)
        with self.notes.holding_back() as held:
            self.apply(pattern)
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
        self.judge.unequal, self.notes.at = set(), {}
        try:
            ask.check_time()
            for proposal in self._proposals(pattern, view, ask):
                ask.check_time()
                if proposal.anchor not in taken and (anchors is None or proposal.anchor in anchors):
                    match = self.judge.decide(pattern, proposal, ask, taken, self.outputs)
                    if match is not None:
                        matches.append(match)
                        taken.update(match.region.computed)
                        self.outputs.update(match.region.outputs)
            if self.judge.unequal:
                matches += self._as_in_the_sample(pattern, view, ask, taken)
        except OutOfTime:
            self.ended = True
            why = "the search ended here, and what comes after it was not looked for: its time was over (budget=…)"
            self.notes.note(pattern, "near miss", (), None, reason=why)
        except Exception as error:  # what it proposes or answers is not what it should be
            self.notes.note(pattern, "near miss", (), None, reason=failed(pattern, "failed", error))
        raised = ask.settled.get(("raised", id(pattern)))
        if not matches and raised is not None and ("ran", id(pattern)) not in ask.settled:
            why = f"the example raised {said(raised)} for every region"
            self.notes.note(pattern, "near miss", (), None, reason=why)
        if not matches:
            return
        try:
            with self.notes.clock("rewrite"):
                self._rewrite(matches)
            self.reading = None
        except Exception as error:
            why = failed(pattern, "failed while the graph was rewritten", error)
            raise Broken(pattern, self.notes.note(pattern, "refused", (), None, reason=why)) from error

    def _as_in_the_sample(self, pattern: Pattern, view: GraphView, ask: Probe, taken: set[Node]) -> Iterator[Match]:
        """What could not be run, asked once more: sizes are equal that are equal in the sample."""
        if not self.judge.ties:
            return
        with ask.tied(self.judge.ties):
            for proposal in self._proposals(pattern, view, ask):
                ask.check_time()
                if proposal.anchor not in self.judge.unequal or proposal.anchor in taken:
                    continue
                earlier = self.notes.at.pop(proposal.anchor, [])
                match = self.judge.decide(pattern, proposal, ask, taken, self.outputs)
                later = self.notes.at.pop(proposal.anchor, [])
                known = match is not None or any(ONE_DIM in str(entry.reason) for entry in later)
                self.notes.take_back(earlier if known or not earlier else later)
                if match is not None:
                    taken.update(match.region.computed)
                    self.outputs.update(match.region.outputs)
                    yield match

    def _proposals(self, pattern: Pattern, view: GraphView, ask: Probe) -> Iterator[Proposal]:
        return self.notes.guarded(pattern, self.notes.timed("propose", lambda: pattern.propose(view, ask)))

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
                    parameters=with_names(match.found.parameters, match.region),
                    source=source_line(match.region.output),
                    module=module_path(match.region.output),
                    evidence=match.body.evidence,
                )
            )
        splicer.finish()
