"""What the rule for one operator may ask of whoever reads a program: sizes, free indices, elements of its operands.

The rules (`moves`, `pointwise`, `written` …) take an `Elements`; `fxfuse.proof.positions.reader.Reader` is the one that
looks up which rule an operator has.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Node

from fxfuse.graph.view import fake, tensor
from fxfuse.proof.arithmetic import float_number
from fxfuse.proof.positions.terms import Kind, Term, Terms, Unreadable
from fxfuse.proof.positions.views import apart, is_one

Index = tuple[Term, ...]


class Elements(ABC):
    """Sizes and elements of one program's tensors as terms.

    Args:
        ranges: value range of each symbol, `ExportedProgram.range_constraints`.
    """

    def __init__(self, ranges: Mapping[Any, Any]) -> None:
        self.terms = Terms()
        self.opaque = False
        """Is what cannot be read taken as it is, element by element? Enough to tell that two elements are computed
        alike; nothing else is known of it."""
        self._ranges = ranges
        self._sizes: dict[Any, Term] = {}
        self._limits: dict[Term, Term] = {}
        """For each free index the size that it is below."""
        self._open = 0
        """How many blocks of `anywhere` are open: each has a variable of its own."""

    @abstractmethod
    def read(self, node: Node, index: Index) -> Term:
        """The element of `node` at `index`, as its readers find it.

        Raises:
            Unreadable: a step on the way cannot be said in terms.
        """

    def operand(self, arg: Any, index: Index) -> Term:
        """What an elementwise call reads of this argument for its own element `index`."""
        if not isinstance(arg, Node) or tensor(arg) is None:
            return self.scalar(arg)
        shape = fake(arg).shape
        own = index[len(index) - len(shape) :] if shape else ()
        zero = self.terms.number(0)
        return self.read(arg, tuple(zero if is_one(d) else i for d, i in zip(shape, own, strict=True)))

    # ---- sizes and numbers

    def size(self, value: Any) -> Term:
        """A size of the program: an int, or a symbolic expression."""
        if isinstance(value, (bool, int)):
            return self.terms.number(value)
        if isinstance(value, float):
            return float_number(self.terms, value)
        return self.symbolic(value.node.expr)

    def symbolic(self, expr: Any) -> Term:
        """A symbolic expression of sizes."""
        found = self._sizes.get(expr)
        if found is None:
            found = self._sizes[expr] = self._of_expression(expr)
        return found

    def _of_expression(self, expr: Any) -> Term:
        t = self.terms
        if expr.is_Integer:
            return t.number(int(expr))
        if expr.is_Symbol:
            allowed = self._ranges.get(expr)
            low, high = (
                (0, math.inf) if allowed is None else (_bound(allowed.lower, 0), _bound(allowed.upper, math.inf))
            )
            if low == 2:  # what torch writes for any size that it did not see to be 1; the program runs at 1 too
                low = 1
            return t.variable(str(expr), max(low, 0), high)
        if expr.is_number:
            return t.apply(f"size {expr}", (), "real")
        parts = [self.symbolic(a) for a in expr.args]
        name = type(expr).__name__
        if expr.is_Add:
            return t.add(*parts)
        if expr.is_Mul:
            result = parts[0]
            for part in parts[1:]:
                result = t.multiply(result, part)
            return result
        if name in ("Max", "Min") and all(p.kind == "int" for p in parts):
            result = parts[0]
            for part in parts[1:]:
                result = t.maximum(result, part) if name == "Max" else t.minimum(result, part)
            return result
        if name in ("FloorDiv", "CleanDiv") and isinstance(parts[1].number, int) and parts[1].number > 0:
            return t.divide(parts[0], parts[1].number)
        if name in ("Mod", "PythonMod") and isinstance(parts[1].number, int) and parts[1].number > 0:
            return t.remainder(parts[0], parts[1].number)
        return t.apply(f"size {name}", tuple(parts), "int")

    def scalar(self, arg: Any) -> Term:
        """A number among the arguments of a call: written, a size, or a tensor of one element."""
        if isinstance(arg, Node):
            if tensor(arg) is not None:
                return self.read(arg, tuple(self.terms.number(0) for _ in fake(arg).shape))
            value = arg.meta.get("val")
            if isinstance(value, (int, float, bool, torch.SymInt)):
                return self.size(value)
            if self.opaque and isinstance(value, torch.SymFloat):
                return self.terms.given(f"{arg.name} of graph {id(arg.graph)}", (), "real")
            raise Unreadable(f"the number {arg.name}")
        if isinstance(arg, (int, float, bool, torch.SymInt)):
            return self.size(arg)
        raise Unreadable(f"a {type(arg).__name__}")

    def shape(self, node: Node) -> tuple[Term, ...]:
        return tuple(self.size(d) for d in fake(node).shape)

    def index(self, node: Node, name: str = "i") -> Index:
        """Free indices into a tensor, each below the size of its axis; of an axis of one element 0."""
        found = []
        for axis, size in enumerate(fake(node).shape):
            found.append(self.place(f"{name}{axis}", size))
        return tuple(found)

    def place(self, name: str, size: Any) -> Term:
        """A free index below this size."""
        if isinstance(size, int):
            return self.terms.number(0) if size == 1 else self.terms.variable(name, 0, size - 1)
        limit = self.size(size)
        found = self.terms.variable(name, 0, limit.bounds[1] - 1)
        self._limits[found] = limit
        return found

    def expression(self, value: Any) -> Any:
        return value.node.expr if isinstance(value, torch.SymInt) else value

    def apart(self, flat: Term, size: Any) -> tuple[Term, Term] | None:
        """x and y of x · size + y, where y is known to be below the size."""
        return apart(self.terms, self._limits, flat, self.size(size))

    @contextmanager
    def anywhere(self) -> Iterator[Term]:
        """A free index for any element along an axis; within another one it is another."""
        self._open += 1
        try:
            yield self.terms.variable(f"any element {self._open}")
        finally:
            self._open -= 1


def kind_of(dtype: torch.dtype) -> Kind:
    """The kind of terms that elements of this type are."""
    if dtype == torch.bool:
        return "bool"
    return "real" if dtype.is_floating_point or dtype.is_complex else "int"


def dtype_of(arg: Any) -> torch.dtype:
    """The type that an argument of a call has: of a tensor, or of a number."""
    value = arg.meta.get("val") if isinstance(arg, Node) else arg
    if isinstance(value, torch.Tensor):
        return value.dtype
    if isinstance(value, (bool, torch.SymBool)):
        return torch.bool
    return torch.int64 if isinstance(value, (int, torch.SymInt)) else torch.float64


def _bound(value: Any, default: float) -> float:
    try:
        bound = int(value)
    except (TypeError, ValueError, OverflowError, AttributeError):
        return default
    return bound if abs(bound) < 2**31 else default
