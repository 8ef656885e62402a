"""The story: prepare, propose, recognise, prove, rewrite, report.

program = torch.export.export(model, args)
fused = fxfuse.fuse(program)
print(fxfuse.report(fused))
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch.export import ExportedProgram
from torch.fx import Graph

import fxfuse.ops
from fxfuse.errors import FxfuseError
from fxfuse.graph.blocks.inline import inline
from fxfuse.graph.blocks.put_back import put_back
from fxfuse.graph.complex.real_parts import real_tables
from fxfuse.graph.equal import computes_twice, merge_moves, part
from fxfuse.graph.marks import INSERTED
from fxfuse.graph.program import check_program, copy_program, name_outputs
from fxfuse.graph.recompose import recompose, take_apart
from fxfuse.ops.opsets import check_opset
from fxfuse.options import BUDGET, DEFAULT_OPSET, Options, check_frozen
from fxfuse.quiet import shared_specs
from fxfuse.recognise.answers import Pattern
from fxfuse.report.entries import NOTED
from fxfuse.report.layer import calls, one_layer
from fxfuse.report.left import left_alone
from fxfuse.report.model import Entry, Report
from fxfuse.report.refusals import settle
from fxfuse.run import Broken, Run
from fxfuse.state.functional import functionalise, restore
from fxfuse.suppose import Asking
from fxfuse.torch_seams import one_at_a_time, sizes_of_one

REPORT = "fxfuse_report"
"""Where a program, or an ONNX model in memory, keeps its report: in ``meta``."""


def fuse(
    program: ExportedProgram,
    *,
    opset: int = DEFAULT_OPSET,
    patterns: Sequence[Pattern] | None = None,
    prove: Literal["on", "off"] = "on",
    frozen: bool = False,
    accept: Sequence[str] = (),
    budget: float = BUDGET,
    strict: bool = False,
    **of_patterns: Any,
) -> ExportedProgram:
    """Collapse every region that computes a known operator into one op that maps to one ONNX node.

    Args:
        program: as `torch.export.export` captured it (the training IR, before any decomposition). Not changed.
        opset: ONNX opset the ops must exist in: 23, 24 or 25.
        patterns: which patterns to look for, in this order; the whole `catalogue()` by default.
        prove: ``"on"`` proves every rewrite before the graph is touched. ``"off"`` trusts the recognisers.
        frozen: do persistent buffers keep what they hold? Every export to ONNX says so, for the file holds their
            values. Otherwise `load_state_dict` may change them, and nothing is concluded from what they hold.
        accept: refusals to overrule, by the names that the report gives them (``"clamp@model.py:12"``): the break is
            taken for what it is between its bounds. The report goes on saying what was accepted, and where the two
            differ; it says so too where a refusal cannot be overruled. Of a name that changes nothing an
            `FxfuseWarning` is given.
        budget: seconds after which the search for more ends; the report says so. What is fused by then stays.
        strict: is a norm left that keeps rows from 0 by a bound, ``F.normalize(x) * √D * g``? An operator only adds an
            epsilon. Where rows of 1e-6 and more come out the same it is fused, and the report says from where on.
        **of_patterns: options of single patterns, by the keywords that these declare; ``fxfuse patterns`` lists them,
            and each pattern's class says what its own mean. ``verify`` is an older name of `prove`.

    A pattern that fails does not take the others down: the report says which one failed, and how.

    Returns:
        A new program. Nodes outside the fused regions are as they were, but for blocks under `no_grad` or
        `torch.autocast` in which something was fused: they are inlined, detached, and the casts that autocast makes
        are written down; and for complex tensors that a fused operator alone reads: they are computed as real and
        imaginary parts. Weights are shared with `program`.

    Raises:
        FxfuseError: not an exported program, fused already, an opset outside 23–25, or an option that is none.
    """
    check_opset(opset)
    check_frozen(frozen)
    options = Options(opset, patterns, prove, frozen, accept, budget, strict).but(**of_patterns)
    return fuse_with(program, options)


def fuse_with(program: ExportedProgram, options: Options) -> ExportedProgram:
    """`fuse`, as the doors call it: with options that were put together, and checked, where they were given."""
    program = check_program(program)
    opset = options.opset or DEFAULT_OPSET
    chosen = options.chosen(opset)
    until = time.perf_counter() + options.budget
    asking = Asking(bool(options.frozen), frozenset(options.accept), until, options.strict)
    broken: list[Entry] = []
    while True:
        try:
            result = _fused(program, opset, chosen, options.prove == "on", asking)
            break
        except Broken as error:  # halfway through a change of the graph: begin anew, without the pattern
            chosen = [p for p in chosen if p is not error.pattern]
            broken.append(error.entry)
    found = result.graph_module.meta[REPORT]
    found.entries.extend(program.graph_module.meta.get(NOTED, ()))
    found.entries.extend(broken)
    settle(found, options.accept, program.graph_module)
    return result


def _fused(
    program: ExportedProgram, opset: int, patterns: Sequence[Pattern], proving: bool, asking: Asking
) -> ExportedProgram:
    """The program with these patterns applied, and its report.

    Raises:
        Broken: what a pattern puts in its place does not fit into the graph, or it failed while it prepared it.
    """
    started = time.perf_counter()
    result = copy_program(program)
    report = Report(opset, nodes_before=_calls(result.graph))
    run = Run(result, report, proving, asking)
    blocks = inline(result)
    for pattern in patterns:
        run.prepare(pattern)
    before = calls(result.graph)
    recomposed = recompose(result.graph)
    writes = functionalise(result.graph)
    name_outputs(result)
    with sizes_of_one():
        moves = merge_moves(result.graph)
        match = run.apply_twice if computes_twice(result.graph) else run.apply
        for pattern in patterns:
            match(pattern)
            if run.ended:
                break
        part(result.graph, moves)
    restore(result.graph, writes)
    take_apart(result.graph, recomposed)
    put_back(result, blocks)
    report.entries.extend(left_alone(blocks))
    real_tables(result.graph, [n for n in result.graph.nodes if n.meta.get(INSERTED)])
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


def _calls(graph: Graph) -> int:
    return sum(n.op == "call_function" for n in graph.nodes)


def unfuse(program: ExportedProgram) -> ExportedProgram:
    """The program with every fxfuse op written out in plain ATen again.

    Other operators keep their names; like any `run_decompositions`, it retraces (and functionalises) the program.
    """
    with one_at_a_time(), shared_specs():
        unfused: ExportedProgram = program.run_decompositions(fxfuse.ops.decompositions())
    return unfused
