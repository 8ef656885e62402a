"""The story: propose, recognise, prove, rewrite, report.

program = torch.export.export(model, args)
fused = fxfuse.fuse(program)
print(fxfuse.report(fused))
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch.fx.experimental._config
from torch.export import ExportedProgram
from torch.fx import Graph, Node

import fxfuse.ops
from fxfuse.errors import FxfuseError
from fxfuse.graph.flex import separate_outputs
from fxfuse.graph.functional import functionalise, restore
from fxfuse.graph.program import check_program, copy_program
from fxfuse.graph.region import Region
from fxfuse.graph.source import module_path, source_line
from fxfuse.graph.splice import Guarded, Splicer, trace
from fxfuse.graph.view import GraphView
from fxfuse.graph.wrapped import inline_layers
from fxfuse.ops.registry import check_opset
from fxfuse.options import BUDGET, check_accept, check_budget, check_frozen, check_patterns
from fxfuse.proof.evaluate import CannotEvaluate
from fxfuse.proof.evidence import Evidence
from fxfuse.proof.prove import Refused, prove
from fxfuse.recognise.answers import NEAR, Found, Input, Pattern, Proposal, Reason
from fxfuse.recognise.catalogue import catalogue
from fxfuse.recognise.flex.choices import FlexCalls, Windows, check_flex_attention, check_windows
from fxfuse.recognise.flex.reconstruct import reconstruct
from fxfuse.recognise.questions import BlockMasks, OutOfTime, Questions, check_block_masks
from fxfuse.report.layer import calls, mark, one_layer
from fxfuse.report.model import Entry, Report
from fxfuse.report.refusals import failed, name_of, said, settle
from fxfuse.suppose import Asking, Suppositions

REPORT = "fxfuse_report"
"""Where a program, or an ONNX model in memory, keeps its report: in ``meta``."""
T = TypeVar("T")


def fuse(
    program: ExportedProgram,
    *,
    opset: int = 24,
    patterns: Sequence[Pattern] | None = None,
    verify: Literal["on", "off"] = "on",
    block_mask: BlockMasks = "check",
    flex_attention: FlexCalls = "standard",
    windows: Windows = "mask",
    frozen: bool = False,
    accept: Sequence[str] = (),
    budget: float = BUDGET,
) -> ExportedProgram:
    """Collapse every region that computes a known operator into one op that maps to one ONNX node.

    Args:
        program: as `torch.export.export` captured it (the training IR, before any decomposition). Not changed.
        opset: ONNX opset the ops must exist in: 23, 24 or 25.
        patterns: which patterns to look for, in this order; the whole `catalogue()` by default.
        verify: ``"on"`` runs every region against its replacement before the graph is touched. ``"off"`` trusts the
            recognisers.
        block_mask: what of a `BlockMask` counts in flex_attention. ``"check"``: block lists have to follow from the
            mask function, or the call is left, and reported. ``"reconstruct"``: where they do not, both count, as in
            the compiled kernel. ``"assume_mask_mod"``: the function counts, as in the eager one.
        flex_attention: what a call of flex_attention becomes. ``"standard"``: one Attention, or primitives where its
            mods allow none. ``"preview"``: FlexAttention of ai.onnx.preview instead of the primitives, the mods in its
            `score_mod`; ``"preview_only"``: instead of Attention too. No runtime has that operator yet.
        windows: what ``q - kv <= n`` in a mod becomes. ``"mask"``: a part of the Attention's mask. ``"attributes"``:
            `left_window_size` and `right_window_size`, which need opset 25 and a runtime that has it.
        frozen: do persistent buffers keep what they hold? Every export to ONNX says so, for the file holds their
            values. Otherwise `load_state_dict` may change them, and nothing is concluded from what they hold.
        accept: refusals to overrule, by the names that the report gives them (``"clamp@model.py:12"``): the break is
            taken for what it is between its bounds. The report goes on saying what was accepted, and where the two
            differ; it says so too where a refusal cannot be overruled. Of a name that changes nothing an
            `FxfuseWarning` is given.
        budget: seconds after which the search for more ends; the report says so. What is fused by then stays.

    A pattern that fails does not take the others down: the report says which one failed, and how.

    Returns:
        A new program. Nodes outside the fused regions are as they were, but for layers that run under `no_grad`: they
        are inlined, and detached. Weights are shared with `program`.

    Raises:
        FxfuseError: not an exported program, fused already, an opset outside 23–25, or an option that is none.
    """
    program = check_program(program)
    check_opset(opset)
    if verify not in ("on", "off"):
        raise FxfuseError(f"unknown verify={verify!r}", where="verify", hint='"on" or "off"')
    check_block_masks(block_mask)
    check_flex_attention(flex_attention)
    check_windows(windows, opset)
    check_frozen(frozen)
    check_accept(accept)
    check_budget(budget)
    if patterns is not None:
        check_patterns(patterns)
    chosen = [p for p in (catalogue() if patterns is None else patterns) if p.since_opset <= opset]
    asking = Asking(block_mask, flex_attention, windows, frozen, frozenset(accept), time.perf_counter() + budget)
    broken: list[Entry] = []
    while True:
        try:
            result = _fused(program, opset, chosen, verify == "on", asking)
            break
        except _Broken as error:  # halfway through a rewrite: begin anew, without the pattern
            chosen = [p for p in chosen if p is not error.pattern]
            broken.append(error.entry)
    found = result.graph_module.meta[REPORT]
    found.entries.extend(broken)
    settle(found, accept, program.graph_module)
    return result


def _fused(
    program: ExportedProgram, opset: int, patterns: Sequence[Pattern], verified: bool, asking: Asking
) -> ExportedProgram:
    """The program with these patterns applied, and its report.

    Raises:
        _Broken: what a pattern puts in its place does not fit into the graph.
    """
    started = time.perf_counter()
    result = copy_program(program)
    report = Report(opset, nodes_before=_calls(result.graph))
    run = _Run(result, report, verified, asking)
    inline_layers(result)
    separate_outputs(list(result.graph.nodes))
    if asking.block_mask == "reconstruct":
        reconstruct(result, asking.of(result))
    before = calls(result.graph)
    writes = functionalise(result.graph)
    # As torch.onnx captures and decomposes: its symbols may be 1, and a question whether they are would be a guard.
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        for pattern in patterns:
            run.apply(pattern)
            if run.ended:
                break
    restore(result.graph, writes)
    result.graph_module.recompile()
    report.nodes_after = _calls(result.graph)
    regions = {i: entry.nodes for i, entry in enumerate(report) if entry.status == "fused"}
    report.layer = one_layer(before, result, regions)
    report.seconds["total"] = time.perf_counter() - started
    result.graph_module.meta[REPORT] = report
    return result


def report(program: object) -> Report:
    """What `fuse` did to this program, or to the one that this ONNX program (or its `onnx_ir.Model`) came from.

    Raises:
        FxfuseError: the program was not fused in this process.
    """
    owner = program.graph_module if isinstance(program, ExportedProgram) else program
    meta = getattr(owner, "meta", None)
    found = getattr(program, REPORT, None) or (meta.get(REPORT) if isinstance(meta, Mapping) else None)
    if not isinstance(found, Report):
        raise FxfuseError(
            f"this {type(program).__name__} has no fusion report",
            where="program",
            hint="pass what fxfuse.fuse returned",
        )
    return found


class _Broken(Exception):
    """A rewrite that ended halfway."""

    def __init__(self, pattern: Pattern, entry: Entry) -> None:
        super().__init__(entry.reason)
        self.pattern, self.entry = pattern, entry


@dataclass
class _Match:
    region: Region
    found: Found
    body: _Traced


@dataclass(frozen=True)
class _Traced:
    """A proven replacement."""

    graph: Graph
    evidence: Evidence | None


@dataclass
class _Run:
    """One fusion of one program: answers and proofs are remembered by the shape of the region."""

    program: ExportedProgram
    report: Report
    verified: bool
    asking: Asking
    answers: dict[tuple[int, str], Found | Reason] = field(default_factory=dict)
    proofs: dict[tuple[int, str, str], _Traced | str] = field(default_factory=dict)
    own: set[int] = field(default_factory=set)
    """Answers that hold for what this program's constants and positions are."""
    reading: tuple[GraphView, Questions] | None = None
    """What is known of the graph as it stands; None once it was rewritten."""
    ended: bool = False
    """Is the time over?"""

    def __post_init__(self) -> None:
        self.suppose = Suppositions(self.program, self.asking)

    def apply(self, pattern: Pattern) -> None:
        """Match the whole graph against one pattern, then rewrite it."""
        view, ask = self.reading = self.reading or (GraphView(self.program.graph), self.asking.of(self.program))
        matches: list[_Match] = []
        taken: set[Node] = set()
        try:
            ask.check_time()
            for proposal in self._guarded(pattern, self._timed("propose", lambda: pattern.propose(view, ask))):
                ask.check_time()
                if proposal.anchor not in taken:
                    match = self._decide(pattern, proposal, ask, taken)
                    if match is not None:
                        matches.append(match)
                        taken.update(match.region.computed)
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
            self._note(pattern, "refused", (), None, reason=why)
            raise _Broken(pattern, self.report.entries[-1]) from error

    def _decide(self, pattern: Pattern, proposal: Proposal, ask: Questions, taken: set[Node]) -> _Match | None:
        """The best region around one anchor that is the operator and proves it; else why not."""
        found: list[tuple[Region, Found]] = []
        nearest: tuple[Reason, tuple[Node, ...]] | None = None
        near: list[tuple[int, Region]] = []
        if proposal.missed is not None:
            nearest = (proposal.missed, proposal.nodes or (proposal.anchor,))
        for region in self._guarded(pattern, self._timed("propose", lambda: proposal.regions), proposal.anchor):
            ask.check_time()
            if taken & region.computed:
                continue
            answer = self._recognise(pattern, region, ask)
            if isinstance(answer, Found):
                found.append((region, answer))
                if region.closed and proposal.best_rank is not None and answer.rank >= proposal.best_rank:
                    body = self._prove(pattern, region, answer, ask)
                    if isinstance(body, _Traced):
                        return _Match(region, answer, body)
                continue
            if answer.closeness:
                near.append((answer.closeness, region))
            if nearest is None or answer.closeness > nearest[0].closeness:
                nearest = (answer, region.nodes)
        refusal: tuple[str, Region, Found] | None = None
        for region, answer in sorted(found, key=lambda pair: (not pair[0].closed, -pair[1].rank)):
            body = self._prove(pattern, region, answer, ask)
            while isinstance(body, str) and answer.otherwise is not None:
                answer = answer.otherwise.after(f"as {answer.operator} it {body}")
                body = self._prove(pattern, region, answer, ask)
            if isinstance(body, _Traced):
                return _Match(region, answer, body)
            refusal = refusal or (body, region, answer)
        if refusal is not None:
            why, region, answer = refusal
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
            for key in (_key(pattern, region), _own_key(pattern, region, ask) if self.own else None):
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
                key = _key(pattern, region)
            self.answers[key] = answer
            return answer

    def _prove(self, pattern: Pattern, region: Region, found: Found, ask: Questions) -> _Traced | str:
        with self._clock("prove"):
            what = "decomposed" if found.decomposed is not None else found.operator
            general = (*_key(pattern, region), what)
            if general in self.proofs and not found.from_leaves and id(found) not in self.own:
                return self.proofs[general]
            own = (*_own_key(pattern, region, ask), what)
            if own in self.proofs:
                return self.proofs[own]
            ask.read_leaves = found.from_leaves or id(found) in self.own
            result: _Traced | str
            try:
                proof = prove(region, found, ask) if self.verified else None
                form = found.forms[0] if proof is None else proof.form
                result = _Traced(trace(form, region.inputs), None if proof is None else proof.evidence)
            except (Refused, Guarded) as why:
                result = str(why)
            except CannotEvaluate as why:
                result = f"could not be compared: {why}"
            except OutOfTime:
                raise
            except Exception as error:  # whatever a pattern or its replacement does, the export goes on
                result = failed(pattern, "could not be compared", error)
            self.proofs[own if ask.read_leaves else general] = result
            return result

    def _rewrite(self, matches: Iterable[_Match]) -> None:
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
    ) -> None:
        self.report.entries.append(
            Entry(
                operator=str(pattern.operator),
                name=name_of(str(pattern.operator), reason, anchor),
                status=status,
                nodes=tuple(n.name for n in nodes),
                parameters=parameters or {},
                reason=reason,
                source=source_line(anchor) if anchor is not None else None,
                module=module_path(anchor) if anchor is not None else None,
            )
        )

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


def _key(pattern: Pattern, region: Region) -> tuple[int, str]:
    return id(pattern), region.key


def _own_key(pattern: Pattern, region: Region, ask: Questions) -> tuple[int, str]:
    """For answers that hold for the values which these very inputs take in the program, or others computed alike."""
    return id(pattern), region.key + "|" + ",".join(ask.content(n) for n in region.others)


def _named(parameters: dict[str, Any], region: Region) -> dict[str, Any]:
    """Parameters with the names of the tensors that they are."""

    def name(value: Any) -> Any:
        if isinstance(value, list):
            return [name(v) for v in value]
        return region.inputs[value.position].name if isinstance(value, Input) else value

    return {key: name(value) for key, value in parameters.items()}


def _calls(graph: Graph) -> int:
    return sum(n.op == "call_function" for n in graph.nodes)


def unfuse(program: ExportedProgram) -> ExportedProgram:
    """The program with every fxfuse op written out in plain ATen again.

    Other operators keep their names; like any `run_decompositions`, it retraces (and functionalises) the program.
    """
    unfused: ExportedProgram = program.run_decompositions(fxfuse.ops.decompositions())
    return unfused
