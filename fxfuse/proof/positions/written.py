"""Elements of tensors that are written in place: what was written last before they are read.

m = zeros(S, S); m[:, :2] = 1        m[i, j] = (j < 2) ? 1 : 0
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from fxfuse.graph.view import ASSERTIONS, bases, fake, is_size, mutated, op_name, storage_roots
from fxfuse.proof.arithmetic import narrowed
from fxfuse.proof.positions.axes import at
from fxfuse.proof.positions.elements import Elements, dtype_of
from fxfuse.proof.positions.moves import MOVES
from fxfuse.proof.positions.pointwise import POINTWISE
from fxfuse.proof.positions.terms import Term, Unreadable
from fxfuse.state.writes import shares_storage

_NO_WRITE = frozenset(["detach_", "requires_grad_"])
"""Operators whose schemas say that they write although no element changes. `torch.tensor([…])` in a forward is captured
with a `detach_`."""


class Writes:
    """The writes of one graph, and the moment that is being read at.

    Args:
        graph: None for one in which nothing is written.
    """

    def __init__(self, graph: Graph | None) -> None:
        nodes = [] if graph is None else list(graph.nodes)
        self._order = {node: place for place, node in enumerate(nodes)}
        self._writers = [(n, roots) for n in nodes if op_name(n) not in _NO_WRITE and (roots := mutated(n))]
        self._storages = {root for _, roots in self._writers for root in roots}
        self.any = bool(self._writers)
        self.time = len(nodes)
        """The moment that is being read at, as a place in the graph: the writes before it have been made."""

    @property
    def given(self) -> set[Node]:
        """Those inputs of the graph that it writes to."""
        return {root for root in self._storages if root.op == "placeholder"}

    def touch(self, node: Node) -> bool:
        """Is the node's storage ever written?"""
        return self.any and bool(storage_roots(node) & self._storages)

    def reading(self, node: Node) -> int:
        """The moment at which a call reads its operands. A view reads nothing itself: its readers do, later."""
        return self.time if shares_storage(node) else self._order.get(node, self.time)

    def read(self, reader: Elements, node: Node, index: tuple[Term, ...]) -> Term | None:
        """The element as the last write left it; None where nothing was written since the tensor was made."""
        if not self.touch(node) or (bases(node) and shares_storage(node)):
            return None
        if bases(node):
            roots, made = storage_roots(node), self._order.get(node, -1)
            if any(made < self._order[n] < self.time and roots & written for n, written in self._writers):
                raise Unreadable(f"{node.name}, which may be a copy of what is written to")
            return None
        self._check_time(node)
        earlier = [n for n, roots in self._writers if node in roots and self._order[n] < self.time]
        return self._after(reader, node, index, earlier[-1]) if earlier else None

    def _check_time(self, node: Node) -> None:
        """Refuses to read at the end of the graph if something reads the tensor before a write: there are two answers
        then."""
        if self.time < len(self._order):
            return
        last = max(self._order[n] for n, roots in self._writers if node in roots)
        stack, seen = [node], set[Node]()
        while stack:
            here = stack.pop()
            for user in here.users:
                if user in seen or op_name(user) in ASSERTIONS or is_size(user):
                    continue
                seen.add(user)
                if here in bases(user):
                    stack.append(user)
                elif self._order[user] < last and not mutated(user):
                    raise Unreadable(f"{node.name}, which is read before something is written to it and after")

    def _after(self, reader: Elements, node: Node, index: tuple[Term, ...], writer: Node) -> Term:
        target: Any = writer.args[0] if writer.args else None
        if not isinstance(target, Node) or op_name(writer) == "" or not op_name(writer).endswith("_"):
            raise Unreadable(f"what {writer.name} writes")
        inside, place = self._place(reader, node, target, index)
        before, self.time = self.time, self._order[writer]
        try:
            new = self._written(reader, writer, place)
            old = new if inside is reader.terms.true else reader.read(node, index)
        finally:
            self.time = before
        return reader.terms.choose(inside, new, old)

    def _place(
        self, reader: Elements, base: Node, target: Node, index: tuple[Term, ...]
    ) -> tuple[Term, tuple[Term, ...]]:
        """Is the element of `base` within the view `target` of it, and where there?"""
        chain: list[Node] = []
        while target is not base:
            if not shares_storage(target):
                raise Unreadable(f"a write through {target.name}, which may be a copy")
            chain.append(target)
            target = target.args[0]  # type: ignore[assignment]
        t = reader.terms
        conditions: list[Term] = []
        place = list(index)
        for view in reversed(chain):
            name, rank = op_name(view), len(place)
            if name == "select":
                axis = int(view.args[1]) % rank  # type: ignore[arg-type]
                wanted = at(reader, view.args[0], axis, reader.scalar(view.args[2]))  # type: ignore[arg-type]
                conditions.append(t.equal(place.pop(axis), wanted))
            elif name == "slice" and len(view.args) < 5:
                axis = int(view.args[1]) % rank if len(view.args) > 1 else 0  # type: ignore[arg-type]
                start = reader.scalar(view.args[2] if len(view.args) > 2 and view.args[2] is not None else 0)
                if start.bounds[0] < 0:
                    raise Unreadable("a write to a slice that may start before 0")
                length = reader.size(fake(view).shape[axis])
                place[axis] = t.subtract(place[axis], start)
                conditions += [t.at_most(t.number(0), place[axis]), t.less(place[axis], length)]
            elif name == "unsqueeze":
                place.insert(int(view.args[1]) % (rank + 1), t.number(0))  # type: ignore[arg-type]
            elif name == "transpose":
                a, b = (int(d) % rank for d in view.args[1:3])  # type: ignore[arg-type]
                place[a], place[b] = place[b], place[a]
            elif name not in ("detach", "alias"):
                raise Unreadable(f"a write through {name}")
        return t.every(conditions), tuple(place)

    def _written(self, reader: Elements, writer: Node, place: tuple[Term, ...]) -> Term:
        name = op_name(writer)[:-1]
        target: Any = writer.args[0]
        if name in ("fill", "zero", "copy"):
            value = 0 if name == "zero" else writer.args[1]
            return narrowed(reader.terms, reader.operand(value, place), dtype_of(value), fake(target).dtype)
        step = POINTWISE.get(name)
        found = step(reader, writer, place) if step is not None else None
        if found is None and name in ("tril", "triu"):
            found = MOVES[name](reader, writer, place)
        if found is None:
            raise Unreadable(f"what {op_name(writer)} writes")
        result: Term = found
        return result
