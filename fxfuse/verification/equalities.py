"""What is proven of a program's values: the original, and fusions of it that were proven just now, as equal terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch.export import ExportedProgram
from torch.fx import Node

from fxfuse.graph.marks import FUNCTIONAL, INSERTED, STANDS_FOR
from fxfuse.graph.program import copy_program
from fxfuse.graph.source import module_path, source_line
from fxfuse.graph.view import op_name
from fxfuse.ops.registry import OPS, PARTS
from fxfuse.report.model import Entry, Report
from fxfuse.state.functional import functionalise
from fxfuse.torch_seams import overload_name
from fxfuse.verification.classes import Classes, Head
from fxfuse.verification.numbering import Numbering, number


@dataclass
class Fusion:
    """One fusion of the original, proven in this process."""

    program: ExportedProgram
    report: Report
    numbering: Numbering
    inserted: list[Node]

    def entries(self, node: Node) -> list[Entry]:
        """The regions that an inserted node may stand for: of its operator, on its line, in its module."""
        place = source_line(node), module_path(node)
        done = [e for e in self.report if e.status in ("fused", "decomposed") and (e.source, e.module) == place]
        name = onnx_name(node)
        return [e for e in done if name in (None, e.operator) or e.operator not in _NAMES] or done


_NAMES = frozenset(op.onnx_name for op in (OPS | PARTS).values())


def onnx_name(node: Node) -> str | None:
    """The ONNX operator that a fused node is; None of other nodes."""
    op = OPS.get(node.target) or PARTS.get(node.target)  # type: ignore[call-overload]
    return None if op is None else op.onnx_name


@dataclass
class Read:
    """A fused program that was read against what is proven."""

    program: ExportedProgram
    numbering: Numbering
    unknown: list[Node] = field(default_factory=list)
    """Nodes whose value neither the original nor a proven fusion computes."""


class Equalities:
    """Equal values of one program, as far as they are proven."""

    def __init__(self, original: ExportedProgram) -> None:
        self.source = copy_program(original)
        """To be fused. What an earlier fusion noted on its nodes is not believed."""
        for node in self.source.graph.nodes:
            for note in (INSERTED, STANDS_FOR, FUNCTIONAL):
                node.meta.pop(note, None)
        self.original = readable(original)
        self.classes = Classes()
        self.base = number(self.original, self.classes.term, self.classes.find)
        self.fusions: list[Fusion] = []
        self.clear = True
        """False once two storages that are written to were taken for one: nothing is proven then."""
        self._names = {n.name: n for n in self.original.graph.nodes if FUNCTIONAL not in n.meta}

    def add(self, fused: ExportedProgram, report: Report) -> None:
        """Take in a fusion of the original that was made and proven in this process."""
        functionalise(fused.graph)
        numbering = number(fused, self.classes.term, self.classes.find)
        inserted = []
        for node, term in numbering.of.items():
            own = self._names.get(node.name)
            if own is None or node.meta.get(INSERTED) or node.meta.get(FUNCTIONAL) or not _same_call(own, node):
                inserted.append(node)
                own = self._stands_for(node)
            if own is not None:
                self.classes.union(term, self.base.of[own])
        self.classes.close()
        find = self.classes.find
        owned = {t: n for n, t in self.base.owned.items()}
        self.clear = self.clear and len({find(t) for t in owned}) == len(owned)
        self.fusions.append(Fusion(fused, report, numbering, inserted))

    def _stands_for(self, node: Node) -> Node | None:
        """The node of the original whose value an inserted node was proven to give."""
        name, old = node.meta.get(STANDS_FOR, (None, None))
        return self._names.get(old) if name == node.name else None

    def read(self, program: ExportedProgram) -> Read:
        """The values of a `readable` program of which nothing is known."""
        fresh = 0

        def make(head: Head, children: Sequence[int]) -> int:
            nonlocal fresh
            known = self.classes.known(head, children)
            if known is None:
                fresh += 1
                known = self.classes.term(("unknown", id(program), fresh))
                unknown.add(known)
            return known

        unknown: set[int] = set()
        numbering = number(program, make, self.classes.find)
        return Read(program, numbering, [n for n, t in numbering.of.items() if t in unknown])

    def same(self, one: int, two: int) -> bool:
        return self.classes.find(one) == self.classes.find(two)


def readable(program: ExportedProgram) -> ExportedProgram:
    """A copy in which arithmetic in place that nothing else sees is read as what it computes."""
    copy = copy_program(program)
    functionalise(copy.graph)
    return copy


def _same_call(own: Node, node: Node) -> bool:
    """A node that kept its name is the node of the original; one that was inlined may have the name of another."""
    names = {op_name(n).rstrip("_") for n in (own, node)}
    return own.op == node.op and (own.target == node.target or (len(names) == 1 and _overload(own) == _overload(node)))


def _overload(node: Node) -> str:
    return overload_name(node.target)
