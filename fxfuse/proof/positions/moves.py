"""Operators that only move elements, read backwards: where the element at an index comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from fxfuse.graph.view import argument, fake, op_name
from fxfuse.proof.arithmetic import kept, narrowed, times
from fxfuse.proof.positions.scattered import SCATTERED
from fxfuse.proof.positions.terms import Term, Unreadable
from fxfuse.proof.positions.views import is_one as _one
from fxfuse.proof.positions.views import reshaped

if TYPE_CHECKING:
    from fxfuse.proof.positions.reader import Reader

Index = tuple[Term, ...]
Move = Callable[["Reader", Node, Index], Term]


def _fail(why: str) -> Term:
    raise Unreadable(why)


def axis_of(value: Any, rank: int) -> int:
    return int(value) % max(rank, 1)


def _source(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _rank(node: Node) -> int:
    return fake(node).dim()


def _unsqueeze(reader: Reader, node: Node, index: Index) -> Term:
    axis = axis_of(node.args[1], _rank(node))
    return reader.read(_source(node), index[:axis] + index[axis + 1 :])


def _squeeze(reader: Reader, node: Node, index: Index) -> Term:
    source = _source(node)
    rank = _rank(source)
    if len(node.args) > 1:
        given: Any = node.args[1]
        axes = {axis_of(a, rank) for a in (given if isinstance(given, (list, tuple)) else [given])}
        axes = {a for a in axes if _one(fake(source).shape[a])}
    else:
        axes = {a for a, size in enumerate(fake(source).shape) if _one(size)}
    if rank - len(axes) != len(index):
        return _fail("squeeze of a size that may be one")
    rest = iter(index)
    zero = reader.terms.number(0)
    return reader.read(source, tuple(zero if a in axes else next(rest) for a in range(rank)))


def _expand(reader: Reader, node: Node, index: Index) -> Term:
    return reader.operand(node.args[0], index)


def _permute(reader: Reader, node: Node, index: Index) -> Term:
    source, name = _source(node), op_name(node)
    rank = _rank(source)
    if name == "permute":
        given: Any = node.args[1]
        order = [axis_of(d, rank) for d in given]
    else:
        order = list(range(rank))
        if name == "numpy_T":
            order.reverse()
        elif name in ("movedim", "moveaxis"):
            pairs: Any = node.args[1:3]
            if not all(isinstance(p, int) for p in pairs):
                return _fail(name)
            start, to = (axis_of(p, rank) for p in pairs)
            order.insert(to, order.pop(start))
        else:
            pair: Any = node.args[1:3] if len(node.args) > 2 else (rank - 2, rank - 1)
            a, b = (axis_of(p, rank) for p in pair)
            if rank > 1:
                order[a], order[b] = order[b], order[a]
    found: list[Any] = [None] * rank
    for axis, place in zip(order, index, strict=True):
        found[axis] = place
    return reader.read(source, tuple(found))


def start_of(reader: Reader, source: Node, axis: int, start: Any) -> Term:
    """Where a slice begins along an axis; a start below 0 counts from the end."""
    t = reader.terms
    begin = t.number(0) if start is None else reader.scalar(start)
    if begin.bounds[0] >= 0:
        return begin
    from_end = t.maximum(t.add(begin, reader.shape(source)[axis]), t.number(0))
    return from_end if begin.bounds[1] < 0 else t.choose(t.at_most(t.number(0), begin), begin, from_end)


def _from(reader: Reader, source: Node, axis: int, start: Any, place: Term, step: int = 1) -> Term:
    """start + step · place along an axis."""
    return reader.terms.add(start_of(reader, source, axis, start), reader.terms.scale(place, step))


def _slice(reader: Reader, node: Node, index: Index) -> Term:
    source = _source(node)
    axis = axis_of(argument(node, "dim"), _rank(node))
    step = argument(node, "step")
    if not isinstance(step, int):
        return _fail("a slice with a step that is not written")
    place = _from(reader, source, axis, argument(node, "start"), index[axis], step)
    return reader.read(source, (*index[:axis], place, *index[axis + 1 :]))


def _narrow(reader: Reader, node: Node, index: Index) -> Term:
    source = _source(node)
    axis = axis_of(node.args[1], _rank(node))
    place = _from(reader, source, axis, node.args[2], index[axis])
    return reader.read(source, (*index[:axis], place, *index[axis + 1 :]))


def at(reader: Reader, source: Node, axis: int, place: Term) -> Term:
    """An index that counts from the end where it is below 0."""
    t = reader.terms
    if place.bounds[0] >= 0:
        return place
    size = reader.shape(source)[axis]
    if place.bounds[1] < 0:
        return t.add(place, size)
    return t.choose(t.at_most(t.number(0), place), place, t.add(place, size))


def _select(reader: Reader, node: Node, index: Index) -> Term:
    source = _source(node)
    axis = axis_of(node.args[1], _rank(source))
    place = at(reader, source, axis, reader.scalar(node.args[2]))
    return reader.read(source, (*index[:axis], place, *index[axis:]))


def _flip(reader: Reader, node: Node, index: Index) -> Term:
    source, t = _source(node), reader.terms
    given: Any = node.args[1]
    axes = {axis_of(a, _rank(source)) for a in given}
    sizes = reader.shape(source)
    turned = (t.add(sizes[a], t.scale(i, -1), t.number(-1)) if a in axes else i for a, i in enumerate(index))
    return reader.read(source, tuple(turned))


def _roll(reader: Reader, node: Node, index: Index) -> Term:
    source = _source(node)
    shifts, dims = _list(node.args[1]), _list(argument(node, "dims"))
    if len(shifts) != len(dims) or not dims:
        return _fail("roll of a flattened tensor")
    places = list(index)
    for shift, dim in zip(shifts, dims, strict=True):
        axis = axis_of(dim, _rank(source))
        size = fake(source).shape[axis]
        if not isinstance(size, int) or not isinstance(shift, int):
            return _fail("roll of an axis of any length")
        places[axis] = reader.terms.remainder(reader.terms.add(places[axis], reader.terms.number(-shift)), size)
    return reader.read(source, tuple(places))


def _join(reader: Reader, node: Node, index: Index) -> Term:
    parts: Any = node.args[0]
    rank = len(index)
    axis = axis_of(argument(node, "dim") or 0, rank)
    t = reader.terms
    begin = t.number(0)
    pieces: list[tuple[Term, Node, Term]] = []
    for part in parts:
        size = reader.shape(part)[axis]
        end = t.add(begin, size)
        pieces.append((t.less(index[axis], end), part, begin))
        begin = end
    found: Term | None = None
    for inside, part, begin in reversed(pieces):
        if found is not None and inside is t.false:
            continue
        place = t.subtract(index[axis], begin)
        here = _joined(reader, node, part, (*index[:axis], place, *index[axis + 1 :]))
        found = here if found is None or inside is t.true else t.choose(inside, here, found)
    return found if found is not None else _fail("a concatenation of nothing")


def _joined(reader: Reader, node: Node, part: Node, index: Index) -> Term:
    """An element of a part, in the type of the whole."""
    kinds = fake(part).dtype, fake(node).dtype
    term = reader.read(part, index)
    return term if kinds[0] == kinds[1] else narrowed(reader.terms, term, *kinds)


def _stack(reader: Reader, node: Node, index: Index) -> Term:
    parts: Any = node.args[0]
    axis = axis_of(argument(node, "dim") or 0, len(index))
    rest = index[:axis] + index[axis + 1 :]
    t = reader.terms
    place = index[axis]
    if place.number is not None:
        return _joined(reader, node, parts[int(place.number)], rest)
    found = _joined(reader, node, parts[-1], rest)
    for number in range(len(parts) - 2, -1, -1):
        found = t.choose(t.equal(place, t.number(number)), _joined(reader, node, parts[number], rest), found)
    return found


def _view(reader: Reader, node: Node, index: Index) -> Term:
    source = _source(node)
    if fake(source).dtype != fake(node).dtype:
        return _fail("a view as another type")
    return reader.read(source, reshaped(reader, list(fake(source).shape), list(fake(node).shape), index))


def _repeat(reader: Reader, node: Node, index: Index) -> Term:
    source = _source(node)
    shape: list[Any] = [1] * (len(index) - _rank(source)) + list(fake(source).shape)
    given: Any = node.args[1] if len(node.args) > 1 else ()
    times_each = [1] * (len(index) - len(given)) + list(given)
    places: list[Term] = []
    for size, place, count in zip(shape, index, times_each, strict=True):
        if _one(count):
            places.append(place)
        elif _one(size):
            places.append(reader.terms.number(0))
        elif isinstance(size, torch.SymInt):
            return _fail("a repeat of an axis of any length")
        else:
            places.append(reader.terms.remainder(place, size))
    return reader.read(source, tuple(places[len(index) - _rank(source) :]))


def _repeat_interleave(reader: Reader, node: Node, index: Index) -> Term:
    times = node.args[1] if len(node.args) > 1 else None
    dim = argument(node, "dim")
    if not isinstance(times, int) or dim is None:
        return _fail("repeat_interleave with counts of its own")
    axis = axis_of(dim, len(index))
    return reader.read(_source(node), (*index[:axis], reader.terms.divide(index[axis], times), *index[axis + 1 :]))


def _triangle(lower: bool) -> Move:
    def move(reader: Reader, node: Node, index: Index) -> Term:
        t = reader.terms
        diagonal = reader.scalar(node.args[1] if len(node.args) > 1 else 0)
        offset = t.subtract(index[-1], index[-2])
        kept = t.at_most(offset, diagonal) if lower else t.at_most(diagonal, offset)
        zero = t.false if fake(node).dtype == torch.bool else t.number(0)
        return t.choose(kept, reader.read(_source(node), index), zero)

    return move


def _eye(reader: Reader, node: Node, index: Index) -> Term:
    t = reader.terms
    same = t.equal(index[0], index[1])
    return same if fake(node).dtype == torch.bool else t.as_int(same)


def _index(reader: Reader, node: Node, index: Index) -> Term:
    """x[i, :, j]: the indices broadcast to one another, in the place of the first if they are side by side."""
    source = _source(node)
    given: Any = node.args[1]
    used = [a for a, i in enumerate(given) if i is not None]
    if any(fake(given[a]).dtype == torch.bool for a in used):
        return _fail("picking by a mask")
    rank = max(_rank(given[a]) for a in used)
    first = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    inner = index[first : first + rank]
    outer = list(index[:first] + index[first + rank :])
    places: list[Term] = []
    for axis in range(_rank(source)):
        if axis in used:
            places.append(at(reader, source, axis, reader.operand(given[axis], inner)))
        else:
            places.append(outer.pop(0))
    return reader.read(source, tuple(places))


def _embedding(reader: Reader, node: Node, index: Index) -> Term:
    weight, indices = node.args[:2]
    assert isinstance(weight, Node) and isinstance(indices, Node)
    return reader.read(weight, (reader.read(indices, index[:-1]), index[-1]))


def _index_select(reader: Reader, node: Node, index: Index) -> Term:
    source, axis = _source(node), axis_of(node.args[1], len(index))
    indices = node.args[2]
    assert isinstance(indices, Node)
    place = reader.operand(indices, (index[axis],))
    return reader.read(source, (*index[:axis], place, *index[axis + 1 :]))


def _gather(reader: Reader, node: Node, index: Index) -> Term:
    source, axis = _source(node), axis_of(node.args[1], len(index))
    indices = node.args[2]
    assert isinstance(indices, Node)
    return reader.read(source, (*index[:axis], reader.read(indices, index), *index[axis + 1 :]))


def _cumsum(reader: Reader, node: Node, index: Index) -> Term:
    """Of what is one number along the axis."""
    axis = axis_of(node.args[1], len(index))
    t = reader.terms
    with reader.anywhere() as place:
        term = t.as_int(reader.read(_source(node), (*index[:axis], place, *index[axis + 1 :])))
    if term.kind != "int" or not place.leaves.isdisjoint(term.leaves):
        return _fail("cumsum")
    return kept(t, t.multiply(term, t.add(index[axis], t.number(1))), fake(node).dtype) or _fail("cumsum")


def _whole(term: Term) -> Term:
    return term if term.kind == "int" else _fail("a difference of fractions")


_WRAPPED = (torch.bool, torch.int8, torch.uint8, torch.int16, torch.float16, torch.bfloat16)
"""Differences in these are other numbers."""


def _diff(reader: Reader, node: Node, index: Index) -> Term:
    """Of neighbours; an element before the first that goes on with the count is no exception."""
    given = dict(zip(("n", "dim", "prepend", "append"), node.args[1:], strict=False)) | dict(node.kwargs)
    axis = axis_of(given.get("dim", -1), len(index))
    if given.get("n", 1) != 1 or given.get("append") is not None or fake(node).dtype in _WRAPPED:
        return _fail("diff")
    source, t = _source(node), reader.terms
    before = given.get("prepend")

    def element(place: Term) -> Term:
        return _whole(reader.read(source, (*index[:axis], place, *index[axis + 1 :])))

    one = t.number(1)
    if before is None:
        return t.subtract(element(t.add(index[axis], one)), element(index[axis]))
    if not isinstance(before, Node) or not _one(fake(before).shape[axis]):
        return _fail("diff")
    last = t.subtract(index[axis], one)
    steady = t.subtract(element(index[axis]), element(last))
    first = _whole(reader.read(before, (*index[:axis], t.number(0), *index[axis + 1 :])))
    if element(t.number(-1)) is first:
        return steady
    return t.choose(t.equal(index[axis], t.number(0)), t.subtract(element(index[axis]), first), steady)


def _pieces(reader: Reader, node: Node, position: Any, index: Index) -> Term:
    """split, chunk, unbind: which part of the axis a piece is, read off its shape."""
    source, name = _source(node), op_name(node)
    axis = axis_of(argument(node, "dim") or 0, _rank(source))
    if name == "unbind":
        return reader.read(source, (*index[:axis], reader.terms.number(int(position)), *index[axis:]))
    values: Any = node.meta.get("val")
    t = reader.terms
    begin = t.number(0)
    for piece in values[: int(position)]:
        begin = t.add(begin, reader.size(piece.shape[axis]))
    return reader.read(source, (*index[:axis], t.add(begin, index[axis]), *index[axis + 1 :]))


def _outer(reader: Reader, node: Node, index: Index) -> Term:
    first, second = node.args[:2]
    one, two = reader.operand(first, (index[0],)), reader.operand(second, (index[1],))
    return times(reader.terms, fake(node).dtype, one, two)


def _matmul(reader: Reader, node: Node, index: Index) -> Term:
    """Of few terms: angles are positions times frequencies, with one."""
    left, right = node.args[:2]
    assert isinstance(left, Node) and isinstance(right, Node)
    count = fake(left).shape[-1]
    if not isinstance(count, int) or count > 4 or min(_rank(left), _rank(right)) < 2:
        return _fail("a product of matrices")
    lead, (row, column) = index[:-2], index[-2:]
    t = reader.terms
    parts = []
    for number in range(count):
        inner = t.number(number)
        one = reader.operand(left, (*lead, row, inner))
        two = reader.operand(right, (*lead, inner, column))
        parts.append(times(reader.terms, fake(node).dtype, one, two))
    return parts[0] if count == 1 else t.apply("sum of products", tuple(parts), "real")


def _einsum(reader: Reader, node: Node, index: Index) -> Term:
    """Where nothing is summed: an outer product."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    inputs, _, out = equation.partition("->")
    letters = inputs.split(",")
    if (
        not isinstance(operands, (list, tuple))
        or len(letters) != 2
        or "." in equation
        or set("".join(letters)) - set(out)
    ):
        return _fail("einsum")
    place = dict(zip(out, index, strict=True))
    one, two = (reader.operand(o, tuple(place[c] for c in names)) for o, names in zip(operands, letters, strict=True))
    return times(reader.terms, fake(node).dtype, one, two)


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _complex(reader: Reader, node: Node, index: Index) -> Term:
    """Steps between complex numbers and their parts: of equal parts they are equal."""
    source, name, t = _source(node), op_name(node), reader.terms
    if name == "view_as_real":
        part = "real" if index[-1].number == 0 else "imag" if index[-1].number == 1 else ""
        return t.apply(part, (reader.read(source, index[:-1]),), "real") if part else _fail(name)
    if name == "view_as_complex":
        parts = (reader.read(source, (*index, t.number(n))) for n in range(2))
        return t.apply("complex", tuple(parts), "real")
    return t.apply(name, tuple(reader.operand(a, index) for a in node.args if isinstance(a, Node)), "real")


_SPLITS = ("split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk", "tensor_split")
MOVES: dict[str, Any] = {
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(
        ("transpose", "permute", "t", "mT", "numpy_T", "swapaxes", "swapdims", "movedim", "moveaxis"), _permute
    ),
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "flip": _flip,
    "roll": _roll,
    **dict.fromkeys(("cat", "concat", "concatenate"), _join),
    "stack": _stack,
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "reshape_as", "view_as"), _view),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    "repeat_interleave": _repeat_interleave,
    "tril": _triangle(True),
    "triu": _triangle(False),
    "eye": _eye,
    "index": _index,
    "embedding": _embedding,
    "index_select": _index_select,
    **dict.fromkeys(("gather", "take_along_dim"), _gather),
    **dict.fromkeys(
        ("view_as_real", "view_as_complex", "real", "imag", "polar", "complex", "conj", "_conj", "resolve_conj"),
        _complex,
    ),
    "outer": _outer,
    **dict.fromkeys(("matmul", "bmm", "mm"), _matmul),
    "einsum": _einsum,
    "cumsum": _cumsum,
    **SCATTERED,
    "diff": _diff,
    **{f"{n}[]": _pieces for n in _SPLITS},
}
