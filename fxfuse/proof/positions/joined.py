"""Operators that join tensors along an axis or cut one into pieces: which tensor an element lies in, and where."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from fxfuse.graph.view import argument, fake, op_name
from fxfuse.proof.arithmetic import narrowed
from fxfuse.proof.positions.axes import axis_of, fail, rank_of, source_of
from fxfuse.proof.positions.elements import Elements, Index
from fxfuse.proof.positions.terms import Term


def _join(reader: Elements, node: Node, index: Index) -> Term:
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
    return found if found is not None else fail("a concatenation of nothing")


def _joined(reader: Elements, node: Node, part: Node, index: Index) -> Term:
    """An element of a part, in the type of the whole."""
    kinds = fake(part).dtype, fake(node).dtype
    term = reader.read(part, index)
    return term if kinds[0] == kinds[1] else narrowed(reader.terms, term, *kinds)


def _stack(reader: Elements, node: Node, index: Index) -> Term:
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


def _pieces(reader: Elements, node: Node, position: Any, index: Index) -> Term:
    """split, chunk, unbind: which part of the axis a piece is, read off its shape."""
    source, name = source_of(node), op_name(node)
    axis = axis_of(argument(node, "dim") or 0, rank_of(source))
    if name == "unbind":
        return reader.read(source, (*index[:axis], reader.terms.number(int(position)), *index[axis:]))
    values: Any = node.meta.get("val")
    t = reader.terms
    begin = t.number(0)
    for piece in values[: int(position)]:
        begin = t.add(begin, reader.size(piece.shape[axis]))
    return reader.read(source, (*index[:axis], t.add(begin, index[axis]), *index[axis + 1 :]))


def _meshgrid(reader: Elements, node: Node, position: Any, index: Index) -> Term:
    """Of the grid along one tensor an element depends on the place along that tensor's axis."""
    tensors: Any = node.args[0]
    axis = int(position) % len(tensors)
    part = tensors[axis]
    if argument(node, "indexing") == "xy" and axis < 2 and len(tensors) > 1:
        axis = 1 - axis
    return reader.read(part, (index[axis],) if rank_of(part) else ())


_SPLITS = ("split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk", "tensor_split")
JOINED: dict[str, Any] = {
    **dict.fromkeys(("cat", "concat", "concatenate"), _join),
    "stack": _stack,
    **{f"{n}[]": _pieces for n in _SPLITS},
    "meshgrid[]": _meshgrid,
}
