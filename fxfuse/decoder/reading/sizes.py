"""How `reader.py` reads the sizes of what ONNX's operators give, from the sizes of what they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from fxfuse.decoder.reading.elements import Elements
from fxfuse.proof.positions.terms import Term, Terms, Unreadable
from fxfuse.proof.positions.views import Product

Sizes = tuple[Term, ...]
_END = 2**31 - 1
"""In Slice, a number of this size or more means "to the end": no axis is as long."""


def given(node: ir.Node, number: int) -> ir.Value | None:
    """An input of a node; None where it is left out."""
    return node.inputs[number] if number < len(node.inputs) else None


def needed(node: ir.Node, number: int = 0) -> ir.Value:
    found = given(node, number)
    if found is None:
        raise Unreadable(f"{node.op_type} without an input that it needs")
    return found


def whole(reader: Elements, node: ir.Node, name: str, number: int) -> list[int] | None:
    """Numbers that are an attribute of the node or, in later opsets, an input; None where they are left out."""
    if name in node.attributes:
        return list(node.attributes[name].as_ints())
    value = given(node, number)
    return None if value is None else reader.numbers(value)


def axis_of(node: ir.Node, rank: int, default: int = 0) -> int:
    return node.attributes.get_int("axis", default) % max(rank, 1)


def first(reader: Elements, node: ir.Node, _: int = 0) -> Sizes:
    """The sizes of the first input, for operators that keep them."""
    return reader.shape(needed(node))


def together(reader: Elements, node: ir.Node, _: int = 0) -> Sizes:
    return reader.broadcast(*(reader.shape(v) for v in node.inputs if v is not None))


def dims(node: ir.Node, rank: int) -> range:
    """The axes whose sizes a Shape gives."""
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", rank)
    start, end = (n + rank if n < 0 else n for n in (start, end))
    return range(min(max(start, 0), rank), min(max(end, 0), rank))


def _shape(reader: Elements, node: ir.Node, _: int) -> Sizes:
    return (reader.terms.number(len(dims(node, len(reader.shape(needed(node)))))),)


def _expand(reader: Elements, node: ir.Node, _: int) -> Sizes:
    return reader.broadcast(reader.shape(needed(node)), reader.vector(needed(node, 1)))


def _reshape(reader: Elements, node: ir.Node, _: int) -> Sizes:
    t, inner = reader.terms, reader.shape(needed(node))
    keeps_zero = node.attributes.get_int("allowzero", 0)
    outer: list[Term | None] = []
    for axis, size in enumerate(reader.vector(needed(node, 1))):
        same = inner[axis] if axis < len(inner) else None
        if size.number == -1:
            outer.append(None)
        elif size.number == 0 and not keeps_zero:
            outer.append(same)
        elif size.bounds[0] >= (0 if keeps_zero else 1) or (size is same and size.bounds[0] >= 0):
            outer.append(size)
        else:
            raise Unreadable(f"Reshape to a size {size} that may be 0 or -1")
    if None in outer:
        total, known = (_total(sizes) for sizes in (inner, [size for size in outer if size is not None]))
        rest = total.over(known)
        if rest is None or outer.count(None) > 1:
            raise Unreadable("Reshape to a size that cannot be told")
        outer[outer.index(None)] = rest.term(t)
    return tuple(size for size in outer if size is not None)


def _total(sizes: Any) -> Product:
    result = Product(1, ())
    for size in sizes:
        result = result * Product.of(size)
    return result


def permutation(node: ir.Node, rank: int) -> list[int]:
    return list(node.attributes.get_ints("perm", tuple(reversed(range(rank)))))


def _transpose(reader: Elements, node: ir.Node, _: int) -> Sizes:
    sizes = reader.shape(needed(node))
    return tuple(sizes[axis] for axis in permutation(node, len(sizes)))


def new_axes(reader: Elements, node: ir.Node, rank: int) -> set[int]:
    """The axes that Unsqueeze adds to a tensor of this rank, as they are counted in the result."""
    axes = whole(reader, node, "axes", 1) or []
    return {axis % (rank + len(axes)) for axis in axes}


def _unsqueeze(reader: Elements, node: ir.Node, _: int) -> Sizes:
    sizes = reader.shape(needed(node))
    axes, rest, one = new_axes(reader, node, len(sizes)), iter(sizes), reader.terms.number(1)
    return tuple(one if axis in axes else next(rest) for axis in range(len(sizes) + len(axes)))


def old_axes(reader: Elements, node: ir.Node) -> set[int]:
    """The axes that Squeeze takes out.

    Raises:
        Unreadable: it takes out all of size 1, and of one it is not known whether it is.
    """
    sizes = reader.shape(needed(node))
    axes = whole(reader, node, "axes", 1)
    if axes is not None:
        return {axis % len(sizes) for axis in axes}
    if any(size.number is None for size in sizes):
        raise Unreadable("Squeeze of a size that may be 1")
    return {axis for axis, size in enumerate(sizes) if size.number == 1}


def _squeeze(reader: Elements, node: ir.Node, _: int) -> Sizes:
    axes = old_axes(reader, node)
    return tuple(size for axis, size in enumerate(reader.shape(needed(node))) if axis not in axes)


def _concat(reader: Elements, node: ir.Node, _: int) -> Sizes:
    shapes = [reader.shape(v) for v in node.inputs if v is not None]
    axis = axis_of(node, len(shapes[0]))
    sizes = list(shapes[0])
    sizes[axis] = reader.terms.add(*(shape[axis] for shape in shapes))
    return tuple(sizes)


@dataclass(frozen=True)
class Cut:
    """What Slice takes of one axis: place `start` + step · i for the i-th."""

    start: Term
    step: int
    size: Term


def cuts(reader: Elements, node: ir.Node) -> dict[int, Cut]:
    """What Slice takes of each axis that it is told to cut.

    Raises:
        Unreadable: it goes backwards, other than over a whole axis.
    """
    t, sizes = reader.terms, reader.shape(needed(node))
    if "starts" in node.attributes:  # before opset 10
        raise Unreadable("Slice of an old opset")
    starts, ends = (reader.vector(needed(node, number)) for number in (1, 2))
    axes, steps = (None if (v := given(node, number)) is None else reader.numbers(v) for number in (3, 4))
    found = {}
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = (number if axes is None else axes[number]) % len(sizes)
        step, size = 1 if steps is None else steps[number], sizes[axis]
        if step == -1 and _is_whole(start.number, end.number):
            found[axis] = Cut(t.add(size, t.number(-1)), -1, size)
            continue
        if step < 1:
            raise Unreadable("Slice backwards")
        begin, stop = (_within(t, place, size) for place in (start, end))
        length = t.maximum(t.subtract(stop, begin), t.number(0))
        found[axis] = Cut(begin, step, t.divide(t.add(length, t.number(step - 1)), step))
    return found


def _is_whole(start: Any, end: Any) -> bool:
    """Do this start and end take a whole axis, backwards?"""
    numbers = isinstance(start, int) and isinstance(end, int)
    return numbers and (start == -1 or start >= _END) and end <= -_END


def _within(t: Terms, place: Term, size: Term) -> Term:
    """The place that a start or an end of Slice means: below 0 it counts from the end, and it is kept within the
    axis."""
    if isinstance(place.number, int) and abs(place.number) >= _END:
        return size if place.number > 0 else t.number(0)
    if place.bounds[0] < 0:
        back = t.maximum(t.add(place, size), t.number(0))
        place = back if place.bounds[1] < 0 else t.choose(t.at_most(t.number(0), place), place, back)
    return t.minimum(place, size)


def _slice(reader: Elements, node: ir.Node, _: int) -> Sizes:
    found = cuts(reader, node)
    return tuple(found[a].size if a in found else size for a, size in enumerate(reader.shape(needed(node))))


def _gather(reader: Elements, node: ir.Node, _: int) -> Sizes:
    sizes, indices = reader.shape(needed(node)), reader.shape(needed(node, 1))
    axis = axis_of(node, len(sizes))
    return (*sizes[:axis], *indices, *sizes[axis + 1 :])


def _gather_nd(reader: Elements, node: ir.Node, _: int) -> Sizes:
    sizes, indices = reader.shape(needed(node)), reader.shape(needed(node, 1))
    if indices[-1].number is None:
        raise Unreadable("GatherND by as many places as are computed")
    return (*indices[:-1], *sizes[node.attributes.get_int("batch_dims", 0) + int(indices[-1].number) :])


def pads(reader: Elements, node: ir.Node) -> dict[int, tuple[Term, Term]]:
    """How many elements Pad puts before and after each axis."""
    rank = len(reader.shape(needed(node)))
    numbers, axes = reader.vector(needed(node, 1)), given(node, 3)
    which = list(range(rank)) if axes is None else [axis % rank for axis in reader.numbers(axes)]
    return {axis: (numbers[n], numbers[n + len(which)]) for n, axis in enumerate(which)}


def _pad(reader: Elements, node: ir.Node, _: int) -> Sizes:
    found, sizes = pads(reader, node), reader.shape(needed(node))
    return tuple(reader.terms.add(size, *found.get(axis, ())) for axis, size in enumerate(sizes))


def _tile(reader: Elements, node: ir.Node, _: int) -> Sizes:
    counts = reader.vector(needed(node, 1))
    return tuple(reader.terms.multiply(*pair) for pair in zip(reader.shape(needed(node)), counts, strict=True))


def _range(reader: Elements, node: ir.Node, _: int) -> Sizes:
    t = reader.terms
    start, limit, step = (reader.read(needed(node, number), ()) for number in range(3))
    if not isinstance(step.number, int) or step.number == 0 or "real" in (start.kind, limit.kind):
        raise Unreadable("Range in steps that are computed, or of fractions")
    length = t.subtract(limit, start) if step.number > 0 else t.subtract(start, limit)
    by = abs(step.number)
    return (t.divide(t.add(t.maximum(length, t.number(0)), t.number(by - 1)), by),)


def reduced_axes(reader: Elements, node: ir.Node) -> set[int]:
    rank = len(reader.shape(needed(node)))
    axes = whole(reader, node, "axes", 1)
    if not axes:
        return set() if node.attributes.get_int("noop_with_empty_axes", 0) else set(range(rank))
    return {axis % rank for axis in axes}


def _reduce(reader: Elements, node: ir.Node, _: int) -> Sizes:
    axes, sizes, one = reduced_axes(reader, node), reader.shape(needed(node)), reader.terms.number(1)
    keeps = node.attributes.get_int("keepdims", 1)
    return tuple(one if axis in axes else size for axis, size in enumerate(sizes) if keeps or axis not in axes)


def parts(reader: Elements, node: ir.Node) -> list[Term]:
    """The lengths of the pieces that Split gives."""
    t, sizes = reader.terms, reader.shape(needed(node))
    if (lengths := given(node, 1)) is not None:
        return reader.vector(lengths)
    count, size = len(node.outputs), sizes[axis_of(node, len(sizes))]
    each = t.divide(t.add(size, t.number(count - 1)), count)
    return [*[each] * (count - 1), t.subtract(size, t.scale(each, count - 1))]


def _split(reader: Elements, node: ir.Node, output: int) -> Sizes:
    sizes = list(reader.shape(needed(node)))
    sizes[axis_of(node, len(sizes))] = parts(reader, node)[output]
    return tuple(sizes)


ELEMENTWISE = (
    *("Add", "Sum", "Sub", "Mul", "Div", "Max", "Min", "Mod", "Pow", "BitShift", "BitwiseAnd", "Where"),
    *("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "And", "Or", "Xor"),
)
ALIKE = (
    *("Cast", "CastLike", "Not", "Neg", "Abs", "Floor", "Ceil", "Round", "Relu", "Clip", "IsNaN", "BitwiseNot"),
    *("Identity", "Trilu", "CumSum", "EyeLike"),
)
SHAPES: dict[str, Callable[[Elements, ir.Node, int], Sizes]] = {
    **dict.fromkeys(ELEMENTWISE, together),
    **dict.fromkeys(ALIKE, first),
    "Shape": _shape,
    "Size": lambda reader, node, output: (),
    "ConstantOfShape": lambda reader, node, output: tuple(reader.vector(needed(node))),
    "Expand": _expand,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Concat": _concat,
    "Slice": _slice,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "GatherElements": lambda reader, node, output: reader.shape(needed(node, 1)),
    "Pad": _pad,
    "Tile": _tile,
    "Range": _range,
    **dict.fromkeys(("ReduceSum", "ReduceMax", "ReduceMin"), _reduce),
    "Split": _split,
}
