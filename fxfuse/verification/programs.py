"""A fused program proven against its original again, from nothing but the two.

1  What a caller meets is the same: inputs, outputs, weights bit by bit, sizes and their ranges.
2  The original is fused again, here, every region proven. What stands for what is noted as equalities of values.
3  Every node of the fused program has to compute a value that the original or one of these fusions has, from values of
   which the same is known; what it returns and writes has to be the original's.

Nothing that the first run wrote is read: no report, no metadata, no names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from fxfuse.errors import FxfuseError, ParityError
from fxfuse.fusion import fuse_with, report
from fxfuse.graph.program import check_program
from fxfuse.options import Options
from fxfuse.proof.evidence import Evidence
from fxfuse.recognise.answers import Pattern
from fxfuse.report.model import Entry
from fxfuse.verification.attempts import attempts
from fxfuse.verification.difference import Difference, difference
from fxfuse.verification.equalities import Equalities, Read, onnx_name, readable
from fxfuse.verification.interface import interface_differences


@dataclass(frozen=True)
class Verified:
    """One region of the original that the fused program has another way to compute."""

    operator: str
    """The ONNX operator that it is; of what is decomposed, that it would be."""
    nodes: tuple[str, ...]
    """The nodes of the fused program that stand there."""
    source: str | None
    """The original's line."""
    decomposed: bool
    """Is it computed by primitives, and not by one operator?"""
    frozen: bool
    """Does it hold only as long as persistent buffers keep what they hold?"""
    evidence: Evidence | None


@dataclass(frozen=True)
class Verification:
    """Why a fused program computes what its original does. `str` has a line for each kind of operator."""

    regions: tuple[Verified, ...]
    operators: dict[str, int]
    """Nodes that are operators of this package, by the ONNX operator that they become."""
    kept: int
    """How many calls are the original's own, unchanged."""

    def __str__(self) -> str:
        lines = [f"verified: {self.kept} calls are the original's own"]
        for operator in dict.fromkeys([*self.operators, *(r.operator for r in self.regions)]):
            mine = [r for r in self.regions if r.operator == operator]
            notes = [f"{count} written out in primitives"] if (count := sum(r.decomposed for r in mine)) else []
            if any(r.frozen for r in mine):
                notes.append("while persistent buffers keep what they hold")
            head = f"{operator} ×{self.operators.get(operator) or len(mine)}"
            head += f" ({', '.join(notes)})" if notes else ""
            said = Counter(str(r.evidence) for r in mine if r.evidence is not None)
            if len(said) == 1:
                lines.append(f"{head}: {next(iter(said))}")
            else:
                lines.extend([f"{head}:", *(f"  ×{n} {text}" for text, n in said.items())])
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The verification as plain data, for JSON."""
        return asdict(self)


def verify(
    original: ExportedProgram,
    fused: ExportedProgram,
    *,
    patterns: Sequence[Pattern] | None = None,
    accept: Sequence[str] = (),
    budget: float = 600.0,
    strict: bool = False,
    **of_patterns: Any,
) -> Verification:
    """Prove a fused program against the original once more, region by region, trusting nothing but the two.

    Args:
        original: as `torch.export.export` captured it.
        fused: what `fuse` made of it, perhaps saved and loaded since; or what is said to be that.
        patterns: which patterns to prove with; by default the catalogue, then those whose operators occur.
        accept: refusals that were overruled when it was fused. Beyond them the two differ, which `evidence` says.
        budget: seconds that each fusion of the original may take.
        strict: is nothing taken for proven that differs on the smallest rows? See `fxfuse.fuse`.
        **of_patterns: options of single patterns, as `fuse` was told. Those that show in the fused program are found
            out by themselves.

    Returns:
        What was proven, and how.

    Raises:
        FxfuseError: not an exported program, or an original that is fused already.
        ParityError: the two differ, or could not be proven to be the same. The message names the fused node, the
            original's source line, and what differs.
    """
    check_program(original)
    told = Options.given(patterns=patterns, accept=accept, budget=budget, strict=strict, **of_patterns)
    if not isinstance(fused, ExportedProgram):
        raise FxfuseError(f"expected a torch.export.ExportedProgram, got {type(fused).__name__}", where="fused")
    for what, where in interface_differences(original, fused):
        raise ParityError(f"the fused program is not the original's: {what}", where=where)
    proven = Equalities(original)
    try:
        copy = readable(fused)
    except Exception as error:  # torch's own checks of a program, which nobody made since it was changed
        raise ParityError(f"the fused program is no valid one: {type(error).__name__}: {error}") from error
    read = proven.read(copy)
    found = difference(proven, read)
    tried: list[Options] = []
    done: list[ExportedProgram] = []
    if found is not None:
        for options in attempts(original, fused, told, done):
            again = fuse_with(proven.source, options)
            proven.add(again, report(again))
            tried.append(options)
            done.append(again)
            read = proven.read(copy)
            found = difference(proven, read)
            if found is None:
                break
    if found is not None:
        raise _refused(found)
    _check_metadata(proven, read)
    return _verification(proven, read, [bool(options.frozen) for options in tried])


def _refused(found: Difference) -> ParityError:
    where = f"node {found.node}" + (f", in the original {found.source}" if found.source else "")
    return ParityError(
        f"the fused program could not be proven: {found.what}",
        where=where,
        hint="fuse the original again; pass patterns and accept as they were passed to fuse",
    )


def _check_metadata(proven: Equalities, read: Read) -> None:
    """What exporters read off a node, its type and known sizes, is what the proven value has.

    Raises:
        ParityError: it is not.
    """
    of: dict[int, Node] = {}
    for program in (proven.base, *(f.numbering for f in proven.fusions)):
        for node, term in program.of.items():
            of.setdefault(proven.classes.find(term), node)
    for node, term in read.numbering.of.items():
        other = of.get(proven.classes.find(term))
        one, two = node.meta.get("val"), None if other is None else other.meta.get("val")
        if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
            pairs = zip(one.shape, two.shape, strict=False)
            known = all(a == b for a, b in pairs if type(a) is type(b) is int)
            if one.dtype != two.dtype or one.dim() != two.dim() or not known:
                raise _refused(Difference("its metadata has another type or shape than it computes", node.name, None))


def _verification(proven: Equalities, read: Read, frozen: list[bool]) -> Verification:
    first, nodes = proven.classes.first, list(read.program.graph.nodes)
    base = {first(term) for term in proven.base.of.values()}
    calls: dict[int, list[Node]] = {}
    for node in nodes:
        if node.op == "call_function":
            calls.setdefault(first(read.numbering.of[node]), []).append(node)
    standing: dict[tuple[str, ...], tuple[Entry, bool, list[str]]] = {}
    for place, fusion in enumerate(proven.fusions):
        for node in fusion.inserted:
            key = first(fusion.numbering.of[node])
            for entry in fusion.entries(node) if key not in base and key in calls else []:
                _, _, names = standing.setdefault(entry.nodes, (entry, frozen[place], []))
                names.extend(n.name for n in calls[key])
    regions = (
        Verified(
            entry.operator,
            tuple(dict.fromkeys(names)),
            entry.source,
            entry.status == "decomposed",
            held,
            entry.evidence,
        )
        for entry, held, names in standing.values()
    )
    operators = Counter(name for n in nodes if (name := onnx_name(n)) is not None)
    return Verification(tuple(regions), dict(operators), sum(len(c) for key, c in calls.items() if key in base))
