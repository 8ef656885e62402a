"""What the rule for one operator of ONNX may ask of whoever reads a graph: shapes, types, elements of its inputs.

The rules (`sizes`, `moves`, `pointwise`) take an `Elements`; `fxfuse.decoder.reading.reader.Reader` is the one that
looks up which rule an operator has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch

from fxfuse.proof.positions.terms import Term, Terms, Unreadable
from fxfuse.proof.positions.views import Product, apart

Index = tuple[Term, ...]


class Elements(ABC):
    """Shapes and elements of one graph's values as terms.

    Args:
        sizes: by name of a dimension of an input, the term that it is; other dimensions are free variables.
    """

    def __init__(self, terms: Terms | None, sizes: Mapping[str, Term] | None) -> None:
        self.terms = Terms() if terms is None else terms
        self.facts: list[Term] = []
        """What holds of the sums and extremes over an axis, which are read as unknown terms."""
        self.limits: dict[Term, Term] = {}
        """By free index, the size that it is below."""
        self._sizes = dict(sizes or {})

    @abstractmethod
    def shape(self, value: ir.Value) -> Index:
        """The sizes of a tensor."""

    @abstractmethod
    def type(self, value: ir.Value) -> torch.dtype:
        """The type of a tensor's elements, followed back through the operators.

        Raises:
            Unreadable: it is not known, or none that is read.
        """

    @abstractmethod
    def read(self, value: ir.Value | None, index: Index) -> Term:
        """The element of `value` at `index`.

        Raises:
            Unreadable: a step on the way cannot be said in terms.
        """

    def operand(self, value: ir.Value, index: Index) -> Term:
        """What an elementwise operator reads of this input for its own element `index`."""
        shape = self.shape(value)
        own = index[len(index) - len(shape) :] if shape else ()
        zero = self.terms.number(0)
        return self.read(value, tuple(zero if d.number == 1 else i for d, i in zip(shape, own, strict=True)))

    def named(self, dim: int | ir.SymbolicDim) -> Term:
        """The term for a dimension of an input."""
        if isinstance(dim, int):
            return self.terms.number(dim)
        if dim.value is None:
            raise Unreadable("a size without a name")
        if dim.value not in self._sizes:
            self._sizes[dim.value] = self.terms.variable(f"size {dim.value}")
        return self._sizes[dim.value]

    def broadcast(self, *shapes: Sequence[Term]) -> Index:
        """The sizes of what is computed element by element of tensors of these.

        Raises:
            Unreadable: two differ, and either may be 1 at times.
        """
        result: list[Term] = []
        for shape in shapes:
            own = list(shape)
            while len(result) < len(own):
                result.insert(0, self.terms.number(1))
            for axis, size in enumerate(own, len(result) - len(own)):
                if result[axis].number == 1:
                    result[axis] = size
                elif size.number != 1 and size is not result[axis]:
                    raise Unreadable(f"a tensor of size {size} along with one of {result[axis]}")
        return tuple(result)

    def vector(self, value: ir.Value) -> list[Term]:
        """All elements of a tensor of one axis, or none, whose length is a number: a list of sizes, or of axes.

        Raises:
            Unreadable: it has more axes, or its length is not known.
        """
        shape = self.shape(value)
        if not shape:
            return [self.read(value, ())]
        if len(shape) > 1 or shape[0].number is None:
            raise Unreadable(f"as many numbers as {value.name} has")
        return [self.read(value, (self.terms.number(n),)) for n in range(int(shape[0].number))]

    def numbers(self, value: ir.Value) -> list[int]:
        """The same for constants, as numbers.

        Raises:
            Unreadable: as of `vector`, or an element is computed.
        """
        found = [term.number for term in self.vector(value)]
        if not all(isinstance(n, (int, bool)) for n in found):
            raise Unreadable(f"numbers that the graph computes ({value.name})")
        return [int(n) for n in found]

    def size(self, value: int | Term) -> Term:
        """A size as a term. `fxfuse.proof.positions.views`, which calls this, writes sizes that are known as ints."""
        return self.terms.number(value) if isinstance(value, int) else value

    def expression(self, value: int | Term) -> Product:
        return Product.of(self.size(value))

    def apart(self, flat: Term, size: int | Term) -> tuple[Term, Term] | None:
        return apart(self.terms, self.limits, flat, self.size(size))

    def place(self, name: str, size: Term) -> Term:
        """A variable that stands for any index below this size; 0 where the size is 1."""
        if size.number is not None:
            count = int(size.number)
            return self.terms.number(0) if count == 1 else self.terms.variable(name, 0, count - 1)
        found = self.terms.variable(name, 0, size.bounds[1] - 1)
        self.limits[found] = size
        return found

    def index(self, value: ir.Value) -> Index:
        """Variables that stand for any element of a tensor. Axes of different sizes have different variables."""
        return tuple(self.place(f"i{axis} of {size.serial}", size) for axis, size in enumerate(self.shape(value)))
