"""How `reader.py` reads operators of ONNX that move elements, make them, or sum them up."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir
import torch

from fxfuse.decoder.reading import sizes
from fxfuse.decoder.reading.elements import Elements, Index
from fxfuse.decoder.reading.pointwise import held
from fxfuse.decoder.reading.sizes import axis_of, given, needed
from fxfuse.proof.positions.tables import number
from fxfuse.proof.positions.terms import Term, Unreadable
from fxfuse.proof.positions.views import reshaped

_SUMMED = 64
"""Numbers up to this one are added up along an axis: no axis is so long that the sum would overflow int32."""
Move = Callable[[Elements, ir.Node, Index, int], Term]


def _at(index: Index, axis: int, place: Term) -> Index:
    return (*index[:axis], place, *index[axis + 1 :])


def _from_the_end(reader: Elements, place: Term, size: Term) -> Term:
    """The place that an index means: below 0 it counts from the end."""
    t = reader.terms
    if place.kind != "int":
        raise Unreadable("an index that is not a whole number")
    if place.bounds[0] >= 0:
        return place
    if place.bounds[1] < 0:
        return t.add(place, size)
    return t.choose(t.at_most(t.number(0), place), place, t.add(place, size))


def _which(index: Index) -> int:
    """An index into a list of sizes, as a number: each size has a term of its own.

    Raises:
        Unreadable: which size it picks is computed.
    """
    if index[0].number is None:
        raise Unreadable("a size that is picked by an index")
    return int(index[0].number)


def _shape(reader: Elements, node: ir.Node, index: Index, _: int) -> Term:
    found = reader.shape(needed(node))
    return found[sizes.dims(node, len(found))[_which(index)]]


def _size(reader: Elements, node: ir.Node, index: Index, _: int) -> Term:
    result = reader.terms.number(1)
    for size in reader.shape(needed(node)):
        result = reader.terms.multiply(result, size)
    return result


def _filled(reader: Elements, node: ir.Node, index: Index, _: int) -> Term:
    value = node.attributes.get("value")
    return reader.terms.number(0) if value is None else number(reader.terms, value.as_tensor().numpy().item())


def _same(reader: Elements, node: ir.Node, index: Index, _: int) -> Term:
    return reader.operand(needed(node), index)


def _reshape(reader: Elements, node: ir.Node, index: Index, _: int) -> Term:
    source = needed(node)
    inner, outer = (
        [size if size.number is None else int(size.number) for size in reader.shape(value)]
        for value in (source, node.outputs[0])
    )  # an int where a size is known
    return reader.read(source, reshaped(reader, inner, outer, index))


def _transpose(reader: Elements, node: ir.Node, index: Index, _: int) -> Term:
    order = sizes.permutation(node, len(index))
    return reader.read(needed(node), tuple(index[order.index(axis)] for axis in range(len(index))))


def _unsqueeze(reader: Elements, node: ir.Node, index: Index, _: int) -> Term:
    axes = sizes.new_axes(reader, node, len(reader.shape(needed(node))))
    return reader.read(needed(node), tuple(i for axis, i in enumerate(index) if axis not in axes))


def _squeeze(reader: Elements, node: ir.Node, index: Index, _: int) -> Term:
    axes, rest, zero = sizes.old_axes(reader, node), iter(index), reader.terms.number(0)
    rank = len(reader.shape(needed(node)))
    return reader.read(needed(node), tuple(zero if axis in axes else next(rest) for axis in range(rank)))


def _concat(reader: Elements, node: ir.Node, index: Index, _: int) -> Term:
    t, axis = reader.terms, axis_of(node, len(index))
    begin, pieces = t.number(0), list[tuple[Term, ir.Value, Term]]()
    for value in (v for v in node.inputs if v is not None):
        end = t.add(begin, reader.shape(value)[axis])
        inside = t.less(index[axis], end)
        if inside is not t.false and begin is not end:
            pieces.append((inside, value, begin))
        if inside is t.true:
            break
        begin = end
    if not pieces:
        raise Unreadable("Concat of nothing")
    *before, (_inside, last, begin) = pieces
    found = reader.read(last, _at(index, axis, t.subtract(index[axis], begin)))
    for inside, value, begin in reversed(before):
        found = t.choose(inside, reader.read(value, _at(index, axis, t.subtract(index[axis], begin))), found)
    return found


def _slice(reader: Elements, node: ir.Node, index: Index, _: int) -> Term:
    t, places = reader.terms, list(index)
    for axis, cut in sizes.cuts(reader, node).items():
        places[axis] = t.add(cut.start, t.scale(index[axis], cut.step))
    return reader.read(needed(node), tuple(places))


def _gather(reader: Elements, node: ir.Node, index: Index, _: int) -> Term:
    source, indices = needed(node), needed(node, 1)
    shape = reader.shape(source)
    axis, rank = axis_of(node, len(shape)), len(reader.shape(indices))
    place = _from_the_end(reader, reader.read(indices, index[axis : axis + rank]), shape[axis])
    return reader.read(source, (*index[:axis], place, *index[axis + rank :]))


def _gather_nd(reader: Elements, node: ir.Node, index: Index, _: int) -> Term:
    source, indices = needed(node), needed(node, 1)
    shape, by = reader.shape(source), reader.shape(indices)
    shared, rank = node.attributes.get_int("batch_dims", 0), len(by) - 1
    count = int(by[-1].number or 0)
    places = [
        _from_the_end(reader, reader.read(indices, (*index[:rank], reader.terms.number(n))), shape[shared + n])
        for n in range(count)
    ]
    return reader.read(source, (*index[:shared], *places, *index[rank:]))


def _gather_elements(reader: Elements, node: ir.Node, index: Index, _: int) -> Term:
    source, axis = needed(node), axis_of(node, len(index))
    place = _from_the_end(reader, reader.read(needed(node, 1), index), reader.shape(source)[axis])
    return reader.read(source, _at(index, axis, place))


def _pad(reader: Elements, node: ir.Node, index: Index, _: int) -> Term:
    if node.attributes.get_string("mode", "constant") != "constant":
        raise Unreadable("Pad with what is not constant")
    t, source, filled = reader.terms, needed(node), given(node, 2)
    inside, places = list[Term](), list(index)
    for axis, (before, _after) in sizes.pads(reader, node).items():
        places[axis] = t.subtract(index[axis], before)
        inside += [t.at_most(t.number(0), places[axis]), t.less(places[axis], reader.shape(source)[axis])]
    empty = t.number(0) if filled is None else reader.vector(filled)[0]
    if reader.type(source) == torch.bool:
        empty = t.as_bool(empty)
    within = t.every(inside)
    return empty if within is t.false else t.choose(within, reader.read(source, tuple(places)), empty)


def _tile(reader: Elements, node: ir.Node, index: Index, _: int) -> Term:
    t, source = reader.terms, needed(node)
    places = []
    for size, place, count in zip(reader.shape(source), index, reader.vector(needed(node, 1)), strict=True):
        if size.number is None and count.number != 1:
            raise Unreadable("Tile of an axis of any length")
        places.append(place if count.number == 1 else t.remainder(place, int(size.number)))
    return reader.read(source, tuple(places))


def _range(reader: Elements, node: ir.Node, index: Index, _: int) -> Term:
    t = reader.terms
    start, step = (reader.read(needed(node, n), ()) for n in (0, 2))
    if not isinstance(step.number, int) or start.kind != "int":
        raise Unreadable("Range in steps that are computed, or of fractions")
    found = held(t, t.add(start, t.scale(index[0], step.number)), reader.type(node.outputs[0]))
    if found is None:
        raise Unreadable("Range in floats")
    return found


def _triangle(reader: Elements, node: ir.Node, index: Index, _: int) -> Term:
    t, k = reader.terms, given(node, 1)
    diagonal = t.number(0) if k is None else reader.vector(k)[0]
    offset = t.subtract(index[-1], index[-2])
    upper = node.attributes.get_int("upper", 1)
    kept = t.at_most(diagonal, offset) if upper else t.at_most(offset, diagonal)
    nothing = t.false if reader.type(node.outputs[0]) == torch.bool else t.number(0)
    return t.choose(kept, reader.read(needed(node), index), nothing)


def _eye(reader: Elements, node: ir.Node, index: Index, _: int) -> Term:
    t = reader.terms
    same = t.equal(t.subtract(index[1], index[0]), t.number(node.attributes.get_int("k", 0)))
    return same if reader.type(node.outputs[0]) == torch.bool else t.as_int(same)


def _cumsum(reader: Elements, node: ir.Node, index: Index, _: int) -> Term:
    """CumSum of a tensor that holds one number all along the axis: that number times the count."""
    t, source = reader.terms, needed(node)
    (axis,) = reader.numbers(needed(node, 1))
    axis %= len(index)
    term, same = _anywhere(reader, source, index, axis)
    dtype = reader.type(source)
    if not same or term.kind != "int" or dtype.is_floating_point:
        raise Unreadable("CumSum")
    place = index[axis]
    if node.attributes.get_int("reverse", 0):
        place = t.subtract(t.add(reader.shape(source)[axis], t.number(-1)), place)
    count = place if node.attributes.get_int("exclusive", 0) else t.add(place, t.number(1))
    found = held(t, t.multiply(term, count), dtype)
    assert found is not None
    return found


def _anywhere(reader: Elements, source: ir.Value, index: Index, axis: int) -> tuple[Term, bool]:
    """An element at a free place of this axis, and whether it is the same at every place."""
    name = f"any place in {source.name}"
    term = reader.read(source, _at(index, axis, reader.terms.variable(name)))
    return term, name not in term.leaves


def _reduce(reader: Elements, node: ir.Node, index: Index, _: int) -> Term:
    """A sum or an extreme over one axis: an unknown term, of which `reader.facts` notes what single elements say.

    A maximum is no less than any element. Neither is a sum of numbers that are never below 0, in floats too.
    """
    t, source, kind = reader.terms, needed(node), node.op_type
    axes, shape = sizes.reduced_axes(reader, node), reader.shape(source)
    if len(axes) != 1:
        raise Unreadable(f"{kind} over {len(axes)} axes")
    ((axis,), rest) = axes, list(index)
    if node.attributes.get_int("keepdims", 1):
        rest.pop(axis)
    full = (*rest[:axis], t.number(0), *rest[axis:])
    any_of_them, same = _anywhere(reader, source, full, axis)
    if kind != "ReduceSum" and shape[axis].bounds[0] < 1:
        raise Unreadable(f"{kind} of what may be empty")
    if same and kind != "ReduceSum":
        return any_of_them
    low, high = t.as_int(any_of_them).bounds
    if any_of_them.kind == "real" or (kind == "ReduceSum" and not 0 <= low <= high <= _SUMMED):
        raise Unreadable(kind)
    found = t.apply(f"{kind} of {source.name}", tuple(rest), "int")
    if any_of_them.kind == "bool":
        reader.facts += [t.at_most(t.number(0), found), t.at_most(found, t.number(1))]
    for place in _witnesses(reader, tuple(rest), shape[axis]):
        element = t.as_int(reader.read(source, _at(full, axis, place)))
        reader.facts.append(t.at_most(found, element) if kind == "ReduceMin" else t.at_most(element, found))
    return t.as_bool(found) if any_of_them.kind == "bool" else found


def _witnesses(reader: Elements, index: Index, size: Term) -> Iterator[Term]:
    """Places along an axis that exist at every size, to say something of: its two ends; and, where another index runs
    over no more places than it has, the same place counted among its last ones."""
    t = reader.terms
    if size.bounds[0] >= 1:
        yield from (t.number(0), t.add(size, t.number(-1)))
    for place in index:
        limit = reader.limits.get(place)
        if limit is not None and t.subtract(size, limit).bounds[0] >= 0:
            yield t.add(t.subtract(size, limit), place)


def _split(reader: Elements, node: ir.Node, index: Index, output: int) -> Term:
    axis = axis_of(node, len(index))
    begin = reader.terms.add(reader.terms.number(0), *sizes.parts(reader, node)[:output])
    return reader.read(needed(node), _at(index, axis, reader.terms.add(begin, index[axis])))


MOVES: dict[str, Move] = {
    "Shape": _shape,
    "Size": _size,
    "ConstantOfShape": _filled,
    "Identity": _same,
    "Expand": _same,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Concat": _concat,
    "Slice": _slice,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "GatherElements": _gather_elements,
    "Pad": _pad,
    "Tile": _tile,
    "Range": _range,
    "Trilu": _triangle,
    "EyeLike": _eye,
    "CumSum": _cumsum,
    **dict.fromkeys(("ReduceSum", "ReduceMax", "ReduceMin"), _reduce),
    "Split": _split,
}
