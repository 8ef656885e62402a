"""Reads what an element of a tensor is in an ONNX graph, operator by operator, as `fxfuse.proof.positions` does for FX.

``Reader.read(value, (i, j))`` is the element at row i and column j, as a `Term` over i, j, sizes and inputs; it holds
at every size. Sizes are read from the operators, not from the shapes that a file notes; sizes that the graph computes
with, as tensors of whole numbers, are terms like any other.

Two things are assumed of numbers. Positions, and whole numbers that inputs hold, stay below 2²⁴, and below 2²⁰ where
the graph computes with them in floats, so that these are exact. And where a type of whole numbers is too small for a
result, the result wraps round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch

from fxfuse.decoder.reading.elements import Elements, Index
from fxfuse.decoder.reading.moves import MOVES
from fxfuse.decoder.reading.pointwise import BOOLEAN, STEPS
from fxfuse.decoder.reading.sizes import SHAPES
from fxfuse.proof.positions.tables import table_element
from fxfuse.proof.positions.terms import Kind, Term, Terms, Unreadable

TYPES = {
    ir.DataType.BOOL: torch.bool,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
}
_MOST, _DEEPEST = 20_000, 100


class Reader(Elements):
    """Reads the values of one graph.

    Args:
        sizes: by name of a dimension of an input, the term that it is; other dimensions are free variables.
        inputs: by name of an input, a function that gives its element at an index; other inputs stand for themselves.
    """

    def __init__(
        self,
        terms: Terms | None = None,
        sizes: Mapping[str, Term] | None = None,
        inputs: Mapping[str, Callable[[Index], Term]] | None = None,
    ) -> None:
        super().__init__(terms, sizes)
        self._inputs = inputs or {}
        self._known: dict[Any, Term] = {}
        self._shapes: dict[ir.Value, Index] = {}
        self._tables: dict[ir.Value, torch.Tensor] = {}
        self._depth = 0

    # ---- sizes

    def shape(self, value: ir.Value) -> Index:
        """The sizes of a tensor."""
        if value not in self._shapes:
            with self._deeper():
                self._shapes[value] = self._shape(value)
        return self._shapes[value]

    def _shape(self, value: ir.Value) -> Index:
        if (constant := self._constant(value)) is not None:
            return tuple(self.terms.number(size) for size in constant.shape)
        node = value.producer()
        if node is None:
            if value.shape is None:
                raise Unreadable(f"{value.name}, whose shape is not said")
            return tuple(self.named(dim) for dim in value.shape)
        find = SHAPES.get(_operator(node))
        if find is None:
            raise Unreadable(_operator(node))
        return find(self, node, value.index() or 0)

    @contextmanager
    def _deeper(self) -> Iterator[None]:
        if self._depth >= _DEEPEST:
            raise Unreadable("too deep a computation")
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    # ---- types

    def type(self, value: ir.Value) -> torch.dtype:
        """The type of a tensor's elements, followed back through the operators.

        Raises:
            Unreadable: it is not known, or none that is read.
        """
        if (constant := self._constant(value)) is not None:
            return constant.dtype
        node = value.producer()
        kind = value.dtype if node is None else None
        if node is not None:
            operator = _operator(node)
            if operator in BOOLEAN:
                return torch.bool
            if operator in ("Shape", "Size"):
                return torch.int64
            if operator == "Cast":
                kind = ir.DataType(node.attributes["to"].as_int())
            elif operator == "ConstantOfShape":
                filled = node.attributes.get("value")
                kind = ir.DataType.FLOAT if filled is None else filled.as_tensor().dtype
            elif operator == "EyeLike" and "dtype" in node.attributes:
                kind = ir.DataType(node.attributes["dtype"].as_int())
            else:
                source = node.inputs[1 if operator in ("Where", "CastLike") else 0] if node.inputs else None
                if source is None:
                    raise Unreadable(operator)
                return self.type(source)
        if kind not in TYPES:
            raise Unreadable(f"the type of {value.name}")
        return TYPES[kind]

    # ---- elements

    def read(self, value: ir.Value | None, index: Index) -> Term:
        """The element of `value` at `index`.

        Raises:
            Unreadable: a step on the way cannot be said in terms.
        """
        if value is None:
            raise Unreadable("an input that is left out")
        key = (value, index)
        found = self._known.get(key)
        if found is None:
            if len(self._known) > _MOST:
                raise Unreadable("too long a computation")
            with self._deeper():
                found = self._known[key] = self._read(value, index)
        return found

    def _read(self, value: ir.Value, index: Index) -> Term:
        if (constant := self._constant(value)) is not None:
            try:
                return table_element(self.terms, value.name or "", constant, index)
            except IndexError:
                raise Unreadable(f"an element beyond the end of {value.name}") from None
        node = value.producer()
        if node is None:
            known = self._inputs.get(value.name or "")
            return self.terms.given(value.name or "", index, self._kind(value)) if known is None else known(index)
        operator = _operator(node)
        move = MOVES.get(operator)
        if move is not None:
            return move(self, node, index, value.index() or 0)
        step = STEPS.get(operator)
        if step is None:
            raise Unreadable(operator)
        found = step(self, node, tuple(self.operand(v, index) for v in node.inputs if v is not None))
        if found is None:
            raise Unreadable(f"{operator} in {str(self.type(value)).removeprefix('torch.')}")
        return found

    def _kind(self, value: ir.Value) -> Kind:
        dtype = self.type(value)
        return "bool" if dtype == torch.bool else "real" if dtype.is_floating_point else "int"

    def _constant(self, value: ir.Value) -> torch.Tensor | None:
        if value in self._tables:
            return self._tables[value]
        if value.is_graph_input():  # an initializer that whoever runs the graph may replace
            return None
        found = ir.convenience.get_const_tensor(value)
        if found is None:
            return None
        if found.dtype not in TYPES:
            raise Unreadable(f"the type of {value.name}")
        array = found.numpy()
        if found.dtype == ir.DataType.BFLOAT16:
            array = array.astype("float32")
        self._tables[value] = torch.tensor(array).to(TYPES[found.dtype])
        return self._tables[value]


def _operator(node: ir.Node) -> str:
    return node.op_type if node.domain == "" else f"{node.domain}::{node.op_type}"


__all__ = ["Index", "Reader"]
