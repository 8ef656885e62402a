"""Where a fused program computes something that is not proven, and what is different there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from fxfuse.graph.source import source_line
from fxfuse.verification.equalities import Equalities, Read
from fxfuse.verification.numbering import Numbering
from fxfuse.verification.spelling import arguments, target_name


@dataclass(frozen=True)
class Difference:
    """The first one in the order of the graph."""

    what: str
    node: str
    """The name of the node in the fused program."""
    source: str | None
    """The line of the model that the original's node comes from."""


def difference(proven: Equalities, read: Read) -> Difference | None:
    """The first difference; None where there is none, and so the two programs compute the same."""
    if read.unknown:
        return _of(read.unknown[0], proven, read)
    base, theirs = proven.base, read.numbering
    if base.form != theirs.form:
        return Difference("what it returns is put together otherwise than in the original", "output", None)
    for place, (one, two) in enumerate(zip(base.returned, theirs.returned, strict=True)):
        if not proven.same(base.of[one], theirs.of[two]):
            what = f"output {place} is {two.name}, where the original gives {one.name}"
            return Difference(what, two.name, source_line(one))
    finals = [base.final, *(f.numbering.final for f in proven.fusions)]
    if not any(proven.same(theirs.final, final) for final in finals):
        there = {proven.classes.find(t) for t in theirs.effects.values()}
        for node, term in base.effects.items():
            if proven.classes.find(term) not in there:
                name = target_name(node.target)
                return Difference(f"{name}, which the original does there, is missing", node.name, source_line(node))
        return Difference("what it writes is not what the original writes", "output", None)
    if not proven.clear:
        return Difference("storages that are written to cannot be told apart", "output", None)
    return None


def _of(node: Node, proven: Equalities, read: Read) -> Difference:
    known = [(f.program.graph.nodes, f.numbering) for f in reversed(proven.fusions)]
    known.append((proven.original.graph.nodes, proven.base))
    best: tuple[int, Node, Numbering] | None = None
    for nodes, numbering in known:
        for other in nodes:
            if other.op != node.op:
                continue
            alike = 2 * (other.target == node.target) + (other.name == node.name)
            if alike and (best is None or alike > best[0] or (alike == best[0] == 2)):
                closeness = _closeness(node, other, proven, read, numbering)
                if best is None or (alike, closeness) > (best[0], _closeness(node, best[1], proven, read, best[2])):
                    best = alike, other, numbering
    name = target_name(node.target) if node.op == "call_function" else f"{node.op} {node.target}"
    if best is None:
        return Difference(f"{name} is not part of the original, nor of what was proven of it", node.name, None)
    _, other, numbering = best
    if other.target != node.target:
        instead = target_name(other.target) if other.op == "call_function" else other.op
        return Difference(f"it is {name}, where {instead} is proven", node.name, source_line(other))
    differ = _arguments(node, other, proven, read, numbering)
    source = source_line(other)
    if differ:
        return Difference("; ".join(differ), node.name, source)
    if node.op != "call_function":
        return Difference("it holds something else than in the original", node.name, source)
    return Difference(f"{name} reads or writes what has changed since the original does so", node.name, source)


def _closeness(node: Node, other: Node, proven: Equalities, read: Read, numbering: Numbering) -> int:
    return -len(_arguments(node, other, proven, read, numbering))


def _arguments(node: Node, other: Node, proven: Equalities, read: Read, numbering: Numbering) -> list[str]:
    """Which arguments of two calls of one operator differ."""
    if node.op != "call_function" or other.target != node.target:
        return []
    found = []
    mine, theirs = ({n: (v, k) for n, v, k in arguments(c)} for c in (node, other))
    for name in dict.fromkeys([*mine, *theirs]):
        (value, kind), (expected, _) = mine.get(name, (None, "")), theirs.get(name, (None, ""))
        if not _equal(value, expected, kind, proven, read, numbering):
            found.append(f"{name} is {_shown(value, expected, proven, read)}, proven is {_shown(expected)}")
    return found


def _equal(value: Any, expected: Any, kind: str, proven: Equalities, read: Read, numbering: Numbering) -> bool:
    if isinstance(value, Node) and isinstance(expected, Node):
        return proven.same(read.numbering.of[value], numbering.of[expected])
    if isinstance(value, (list, tuple)) and isinstance(expected, (list, tuple)) and len(value) == len(expected):
        return all(_equal(a, b, kind, proven, read, numbering) for a, b in zip(value, expected, strict=True))
    return not isinstance(value, Node) and not isinstance(expected, Node) and bool(value == expected)


def _shown(value: Any, other: Any = None, proven: Equalities | None = None, read: Read | None = None) -> str:
    """A value; of one that is named as the other is, what it is in the original."""
    if value is None:
        return "absent"
    if isinstance(value, Node) and proven is not None and read is not None and str(value) == str(other):
        term = read.numbering.of[value]
        numberings = [proven.base, *(f.numbering for f in proven.fusions)]
        same = next((n.name for b in numberings for n, t in b.of.items() if proven.same(t, term)), None)
        return f"{value}, which is {same} of the original" if same else f"{value}, which differs"
    return str(value)
