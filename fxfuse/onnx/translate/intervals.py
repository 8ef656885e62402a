"""Which numbers a value of an ONNX graph can hold: a few intervals that contain all of them, and perhaps more.

They follow from constants, casts, sums, products, choices and operators that only move elements. The results of all
other operators count as any number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir

Interval = tuple[float, float]
Intervals = frozenset[Interval]
"""Every element lies in one of these intervals; both ends belong to them."""

Operation = Callable[[Any, Any], Any]
"""A function of two numbers of one type that is monotone in each."""

ANYTHING: Intervals = frozenset({(-math.inf, math.inf)})
MOST = 8
"""If there are more intervals than this, they are joined into one."""
MOST_NUMBERS = 1 << 24
"""A constant with more elements than this is not looked at."""

MOVES = frozenset(
    {"Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice", "Split", "Squeeze"}
    | {"Tile", "Transpose", "Unsqueeze"}
)
"""Operators whose results are elements of their first input."""


Use = tuple[ir.Node, int]
"""An input of a node: the node, and which of its inputs."""


def places(node: ir.Node) -> list[int]:
    """Which inputs of a node `Numbers` looks at to tell the numbers of its outputs; empty if it cannot tell."""
    if node.domain != "":
        return []
    if node.op_type in MOVES or node.op_type in ("Cast", "Trilu"):
        return [0]
    if node.op_type == "Where":
        return [1, 2]
    return list(range(len(node.inputs))) if node.op_type in (*COMPUTED, "Clip", "Concat", "Max", "Min") else []


class Numbers:
    """The intervals of the values of a graph; each value is worked out once.

    Args:
        changed: the content that a constant would have if it were written anew.
        where: the nodes that would read the new content; without it, none would.
    """

    def __init__(
        self,
        changed: Callable[[np.ndarray], np.ndarray] | None = None,
        where: Callable[[ir.Node], bool] = lambda node: False,
    ) -> None:
        self._changed, self._where = changed, where
        self._known: dict[ir.Value, Intervals] = {}
        self._constants: dict[tuple[ir.Value, bool], Intervals] = {}

    def at(self, use: Use) -> Intervals:
        """The intervals of the numbers at a node's input."""
        node, place = use
        value = node.inputs[place]
        if value is None:
            return ANYTHING
        if _is_constant(value):
            return self._of_constant(value, use)
        if value not in self._known:
            self._known[value] = few(self._read(value))
        return self._known[value]

    def _of_constant(self, value: ir.Value, use: Use) -> Intervals:
        key = value, self._changed is not None and self._where(use[0])
        if key not in self._constants:
            array = constant_at(use)
            if array is not None and key[1] and self._changed is not None:
                array = self._changed(array)
            self._constants[key] = of_array(array)
        return self._constants[key]

    def _read(self, value: ir.Value) -> Intervals:
        node = value.producer()
        if node is None or not (read := places(node)):
            return ANYTHING
        if node.op_type == "Cast":
            return _cast(node.inputs[0], value.dtype, self.at((node, 0)))
        if node.op_type == "Clip":
            bounds = [(place, (max, min)[place - 1]) for place in read[1:] if node.inputs[place] is not None]
            return reduce(lambda x, b: _pairs(b[1], x, self.at((node, b[0]))), bounds, self.at((node, 0)))
        every = [self.at((node, place)) for place in read]
        if node.op_type in COMPUTED:
            # Only of these types is it known how a result is rounded.
            kind = {ir.DataType.FLOAT: np.float32, ir.DataType.FLOAT16: np.float16}.get(value.dtype)  # type: ignore[arg-type]
            f = COMPUTED[node.op_type]
            return ANYTHING if kind is None else reduce(lambda x, y: _pairs(f, x, y, kind), every)
        if node.op_type in ("Max", "Min"):
            return reduce(lambda x, y: _pairs(max if node.op_type == "Max" else min, x, y), every)
        zero = [frozenset({(0.0, 0.0)})] if node.op_type == "Trilu" else []
        return frozenset(itertools.chain(*every, *zero))


def holds(numbers: Intervals, number: float) -> bool:
    return any(low <= number <= high for low, high in numbers)


def _is_constant(value: ir.Value) -> bool:
    node = value.producer()
    return (value.const_value is not None and not value.is_graph_input()) or (
        node is not None and node.op_type == "Constant" and node.domain == ""
    )


def constant_at(use: Use) -> np.ndarray | None:
    """The elements of a constant. None if it is no constant, if they are too many, not at hand, or not numbers."""
    value = use[0].inputs[use[1]]
    tensor = ir.convenience.get_const_tensor(value) if value is not None and _is_constant(value) else None
    if tensor is None or tensor.size > MOST_NUMBERS or tensor.dtype == ir.DataType.STRING:
        return None
    try:
        array: np.ndarray = tensor.numpy()
    except (NotImplementedError, RuntimeError, TypeError, ValueError, OSError):  # a weight without data, on "meta"
        return None
    return array if array.dtype.kind in "biuf" else None


def of_array(array: np.ndarray | None) -> Intervals:
    """The numbers of an array: each by itself if there are few, else the interval that the finite ones span."""
    if array is None:
        return ANYTHING
    flat = array.reshape(-1)
    if array.dtype.kind == "f" and np.isnan(flat).any():
        return ANYTHING
    if len(flat) <= 1 << 12 and len(distinct := np.unique(flat)) <= MOST:
        return frozenset((float(n), float(n)) for n in distinct)
    lowest = float(np.finfo(array.dtype if array.dtype.kind == "f" else np.float32).min)
    ends = {(n, n) for n in (-math.inf, lowest) if (flat == n).any()}
    for number, _ in ends:
        flat = flat[flat != number]
    return frozenset(ends | ({(float(flat.min()), float(flat.max()))} if len(flat) else set()))


def few(numbers: Intervals) -> Intervals:
    if len(numbers) <= MOST:
        return numbers
    return frozenset({(min(low for low, _ in numbers), max(high for _, high in numbers))})


def _cast(source: ir.Value | None, to: ir.DataType | None, numbers: Intervals) -> Intervals:
    if source is not None and source.dtype == ir.DataType.BOOL and to is not None and to.is_floating_point():
        return frozenset({(0.0, 0.0), (1.0, 1.0)})
    if source is None or source.dtype is None or to != ir.DataType.FLOAT:
        return ANYTHING
    reach: Interval
    if source.dtype.is_integer():
        reach = (-(2.0**63), 2.0**64)
    elif source.dtype == ir.DataType.FLOAT16:
        reach = (-65504.0, 65504.0)
    elif source.dtype == ir.DataType.FLOAT:
        return numbers
    else:
        return ANYTHING
    finite = {(max(low, reach[0]), min(high, reach[1])) for low, high in numbers}
    kept = {(low, high) for low, high in finite if low <= high}
    infinite = {(sign, sign) for sign in (-math.inf, math.inf) if source.dtype == ir.DataType.FLOAT16}
    return frozenset(kept | {ends for ends in infinite if holds(numbers, ends[0])})


def _pairs(f: Operation, one: Intervals, two: Intervals, kind: Any = np.float32) -> Intervals:
    """The intervals of f's results. As f is monotone, their ends are results at ends of its operands. A nan among them
    means any number."""
    result = set()
    with np.errstate(all="ignore"):
        for x, y in itertools.product(one, two):
            ends = [float(f(kind(a), kind(b))) for a, b in itertools.product(x, y)]
            if any(math.isnan(end) for end in ends):
                return ANYTHING
            result.add((min(ends), max(ends)))
    return few(frozenset(result))


COMPUTED: dict[str, Operation] = {
    "Add": lambda x, y: x + y,
    "Mul": lambda x, y: x * y,
    "Sub": lambda x, y: x - y,
}
"""Rounded to the type, as ONNX rounds them."""
