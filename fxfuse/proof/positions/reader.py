"""What an element of a tensor is, read operator by operator: masks, slots, tables of angles.

``Reader.read(node, (i, j))`` is the element at row i and column j as a `Term` over i, j, sizes, inputs and tables, for
every size that the program admits. Whole numbers are exact in float32 and float64 too (positions stay below 2²⁴);
arithmetic on floats that rounds, and casts to half precision, are steps of which nothing is known. What is written in
place is read as it was written by then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxfuse.graph.blocks.wrapped import wrapped
from fxfuse.graph.view import fake, is_random, mutated, op_name, storage_roots
from fxfuse.proof.arithmetic import narrowed
from fxfuse.proof.positions.elements import Elements, Index, dtype_of, kind_of
from fxfuse.proof.positions.moves import MOVES
from fxfuse.proof.positions.pointwise import POINTWISE, of_constants
from fxfuse.proof.positions.tables import table_element
from fxfuse.proof.positions.terms import Term, Unreadable
from fxfuse.proof.positions.views import is_one
from fxfuse.proof.positions.written import Writes
from fxfuse.torch_seams import ADD_BATCH_DIM, REMOVE_BATCH_DIM

_SAME = frozenset(["detach", "alias", "clone", "contiguous", "lift_fresh_copy", "detach_", "lift_fresh", "positive"])
_FILLED = {"zeros": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1, "ones_like": 1, "new_ones": 1}
_FILLED_WITH = {"fill": 1, "full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}
_MOST = 20_000


class Reader(Elements):
    """Reads the tensors of one program.

    Args:
        ranges: value range of each symbol, `ExportedProgram.range_constraints`.
        constants: tensors that hold what they hold for good, by the name of their placeholder.
    """

    def __init__(self, ranges: Mapping[Any, Any], constants: Mapping[str, torch.Tensor]) -> None:
        super().__init__(ranges)
        self.constants = constants
        self.tables: dict[str, torch.Tensor] = {}
        """Constants that were read, by the name that `given` terms have."""
        self._known: dict[Any, Term] = {}
        self._levels: dict[int, Term] = {}
        """For each level of vmap that is being read, the index along the axis that it hides."""
        self._writes: Writes | None = None
        self._blocks: list[_Block] = []
        """The subgraphs that are being read, each with what was known outside."""

    # ---- elements

    def read(self, node: Node, index: Index) -> Term:
        """The element of `node` at `index`, as its readers find it.

        Raises:
            Unreadable: a step on the way cannot be said in terms.
        """
        if self._writes is None:
            self._writes = Writes(node.graph)
        writes = self._writes
        levels = tuple(self._levels.items()) if self._levels else None
        key = (node, index, levels, writes.time if writes.any else 0, self.opaque)
        found = self._known.get(key)
        if found is None:
            if len(self._known) > _MOST:
                raise Unreadable("too long a computation")
            found = (writes.read(self, node, index) or self._made_then(node, index)) if writes.any else None
            found = self.made(node, index) if found is None else found
            self._known[key] = found
        return found

    def _made_then(self, node: Node, index: Index) -> Term:
        """Operands as they were when the call read them."""
        assert self._writes is not None
        before = self._writes.time
        self._writes.time = self._writes.reading(node)
        try:
            return self.made(node, index)
        finally:
            self._writes.time = before

    def made(self, node: Node, index: Index) -> Term:
        """The element as the call that made the tensor left it, before any write in place."""
        if node.op == "placeholder":
            return self._given(node, index)
        if node.op == "get_attr":
            value: Any = node.graph.owning_module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            if isinstance(value, torch.Tensor):
                return self.table(f"{node.graph.owning_module.__class__.__name__}.{node.target}", value, index)
            raise Unreadable(f"{node.name}")
        if node.op != "call_function":
            raise Unreadable(node.op)
        name = op_name(node)
        function = getattr(node.target, "__name__", "")
        if function in (ADD_BATCH_DIM, REMOVE_BATCH_DIM):
            return self._batch_dim(function, node, index)
        if name == "getitem":
            return self._item(node, index)
        if name in _SAME or (name.endswith("_") and mutated(node)):  # a write in place returns what it wrote to
            return self.operand(node.args[0], index)
        if name in _FILLED:
            return narrowed(self.terms, self.terms.number(_FILLED[name]), torch.int64, fake(node).dtype)
        if name in _FILLED_WITH:
            given = node.args[_FILLED_WITH[name]] if len(node.args) > _FILLED_WITH[name] else node.kwargs["fill_value"]
            return narrowed(self.terms, self.scalar(given), dtype_of(given), fake(node).dtype)
        if name == "arange":
            return self._counted(node, index)
        if name == "linspace":
            ends = tuple(self.scalar(a) for a in node.args[:3])
            return self.terms.apply("linspace", (*ends, index[0], str(fake(node).dtype)), "real")
        move = MOVES.get(name)
        if move is not None:
            moved: Term = move(self, node, index)
            return moved
        step = POINTWISE.get(name)
        if step is not None:
            found: Term | None = step(self, node, index)
            if found is not None:
                return found
        return self.unknown(node, index)

    def unknown(self, node: Node, index: Index) -> Term:
        """An elementwise step without a rule: equal operands give equal results, and nothing else is known.

        Steps that are not elementwise cannot be read without a rule.
        """
        tags: Any = getattr(node.target, "tags", ())
        if torch.Tag.pointwise not in tags or torch.Tag.nondeterministic_seeded in tags:
            if self.opaque and not is_random(node):
                place = (*index, *self._levels.values())
                return self.terms.given(f"{node.name} of graph {id(node.graph)}", place, kind_of(fake(node).dtype))
            raise Unreadable(op_name(node) or str(node.target))
        if (folded := of_constants(self, node, index)) is not None:
            return folded
        args: list[Any] = [str(node.target), str(fake(node).dtype)]
        for arg in (*node.args, *node.kwargs.items()):
            reads = isinstance(arg, Node) or (isinstance(arg, (int, float)) and not isinstance(arg, bool))
            args.append(self.operand(arg, index) if reads else repr(arg))
        return self.terms.apply(args[0], tuple(args[1:]), kind_of(fake(node).dtype))

    def table(self, name: str, value: torch.Tensor, index: Index) -> Term:
        """An element of a constant."""
        if value.is_meta:
            raise Unreadable(f"the constant {name}, which has no data")
        self.tables[name] = value
        return table_element(self.terms, name, value, index)

    def _given(self, node: Node, index: Index) -> Term:
        if self._blocks and node in self._blocks[-1].operands:
            block = self._blocks.pop()
            inner, (self._known, self._writes) = (self._known, self._writes), (block.known, block.writes)
            try:
                return self.operand(block.operands[node], index)
            finally:
                self._known, self._writes = inner
                self._blocks.append(block)
        constant = self.constants.get(node.name)
        if constant is not None:
            return self.table(node.name, constant, index)
        return self.terms.given(node.name, index, kind_of(fake(node).dtype))

    def _item(self, node: Node, index: Index) -> Term:
        source, position = node.args
        assert isinstance(source, Node)
        inside = wrapped(source)
        if inside is None:
            pieces: Callable[..., Term] | None = MOVES.get(op_name(source) + "[]")
            if pieces is None:
                raise Unreadable(op_name(source) or str(source.target))
            return pieces(self, source, position, index)
        *nodes, output = inside.nodes
        placeholders = [n for n in nodes if n.op == "placeholder"]
        results: Any = output.args[0]
        writes = Writes(inside.module.graph)
        operands = dict(zip(placeholders, inside.operands, strict=True))
        for written in writes.given:  # a storage that is given to the block under two names
            roots = storage_roots(operands[written])
            if any(isinstance(o, Node) and storage_roots(o) & roots for p, o in operands.items() if p is not written):
                raise Unreadable("writing in place in a block of its own")
        self._blocks.append(_Block(operands, self._known, self._writes))
        self._known, self._writes = {}, writes
        try:
            return self.read(results[position], index)
        finally:
            block = self._blocks.pop()
            self._known, self._writes = block.known, block.writes

    def _batch_dim(self, function: str, node: Node, index: Index) -> Term:
        """vmap hides an axis of its operands behind a level, and shows it again in the result."""
        source: Any = node.args[0]
        if function == ADD_BATCH_DIM:
            axis, level = (int(a) for a in node.args[1:3])  # type: ignore[arg-type]
            if level not in self._levels:
                raise Unreadable("a vmap that is not closed")
            place = self.terms.number(0) if is_one(fake(source).shape[axis]) else self._levels[level]
            return self.read(source, (*index[:axis], place, *index[axis:]))
        level, axis = (int(node.args[n]) for n in (1, 3))  # type: ignore[arg-type]
        axis = axis % len(index)
        before = self._levels
        self._levels = {**before, level: index[axis]}
        try:
            return self.read(source, (*index[:axis], *index[axis + 1 :]))
        finally:
            self._levels = before

    def _counted(self, node: Node, index: Index) -> Term:
        start, step = self.terms.number(0), self.terms.number(1)
        if len(node.args) > 1:
            start = self.scalar(node.args[0])
            step = self.scalar(node.args[2]) if len(node.args) > 2 else step
        if "real" in (start.kind, step.kind):
            # Rounded at every step: no number is claimed, but the same place of the same count is the same.
            return self.terms.apply("arange", (start, step, index[0], str(fake(node).dtype)), "real")
        found = self.terms.add(start, self.terms.multiply(step, index[0]))
        return narrowed(self.terms, found, torch.int64, fake(node).dtype)


@dataclass(frozen=True)
class _Block:
    """A subgraph: what its placeholders stand for, and what was known where it is called."""

    operands: Mapping[Node, Any]
    known: dict[Any, Term]
    writes: Writes | None


__all__ = ["Index", "Reader", "Unreadable"]
