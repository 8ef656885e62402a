"""Operators that only move elements, read backwards: where the element at an index comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from fxfuse.graph.view import argument, fake, op_name
from fxfuse.proof.positions.axes import at, axis_of, fail, listed, rank_of, source_of, start_of
from fxfuse.proof.positions.combined import COMBINED
from fxfuse.proof.positions.elements import Elements, Index
from fxfuse.proof.positions.joined import JOINED
from fxfuse.proof.positions.scattered import SCATTERED
from fxfuse.proof.positions.selected import SELECTED
from fxfuse.proof.positions.terms import Term
from fxfuse.proof.positions.views import is_one, reshaped

Move = Callable[[Elements, Node, Index], Term]


def _unsqueeze(reader: Elements, node: Node, index: Index) -> Term:
    axis = axis_of(node.args[1], rank_of(node))
    return reader.read(source_of(node), index[:axis] + index[axis + 1 :])


def _squeeze(reader: Elements, node: Node, index: Index) -> Term:
    source = source_of(node)
    rank = rank_of(source)
    if len(node.args) > 1:
        given: Any = node.args[1]
        axes = {axis_of(a, rank) for a in (given if isinstance(given, (list, tuple)) else [given])}
        axes = {a for a in axes if is_one(fake(source).shape[a])}
    else:
        axes = {a for a, size in enumerate(fake(source).shape) if is_one(size)}
    if rank - len(axes) != len(index):
        return fail("squeeze of a size that may be one")
    rest = iter(index)
    zero = reader.terms.number(0)
    return reader.read(source, tuple(zero if a in axes else next(rest) for a in range(rank)))


def _expand(reader: Elements, node: Node, index: Index) -> Term:
    return reader.operand(node.args[0], index)


def _permute(reader: Elements, node: Node, index: Index) -> Term:
    source, name = source_of(node), op_name(node)
    rank = rank_of(source)
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
                return fail(name)
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


def _from(reader: Elements, source: Node, axis: int, start: Any, place: Term, step: int = 1) -> Term:
    """start + step · place along an axis."""
    return reader.terms.add(start_of(reader, source, axis, start), reader.terms.scale(place, step))


def _slice(reader: Elements, node: Node, index: Index) -> Term:
    source = source_of(node)
    axis = axis_of(argument(node, "dim"), rank_of(node))
    step = argument(node, "step")
    if not isinstance(step, int):
        return fail("a slice with a step that is not written")
    place = _from(reader, source, axis, argument(node, "start"), index[axis], step)
    return reader.read(source, (*index[:axis], place, *index[axis + 1 :]))


def _narrow(reader: Elements, node: Node, index: Index) -> Term:
    source = source_of(node)
    axis = axis_of(node.args[1], rank_of(node))
    place = _from(reader, source, axis, node.args[2], index[axis])
    return reader.read(source, (*index[:axis], place, *index[axis + 1 :]))


def _select(reader: Elements, node: Node, index: Index) -> Term:
    source = source_of(node)
    axis = axis_of(node.args[1], rank_of(source))
    place = at(reader, source, axis, reader.scalar(node.args[2]))
    return reader.read(source, (*index[:axis], place, *index[axis:]))


def _flip(reader: Elements, node: Node, index: Index) -> Term:
    source, t = source_of(node), reader.terms
    given: Any = node.args[1]
    axes = {axis_of(a, rank_of(source)) for a in given}
    sizes = reader.shape(source)
    turned = (t.add(sizes[a], t.scale(i, -1), t.number(-1)) if a in axes else i for a, i in enumerate(index))
    return reader.read(source, tuple(turned))


def _roll(reader: Elements, node: Node, index: Index) -> Term:
    source = source_of(node)
    shifts, dims = listed(node.args[1]), listed(argument(node, "dims"))
    if len(shifts) != len(dims) or not dims:
        return fail("roll of a flattened tensor")
    places = list(index)
    for shift, dim in zip(shifts, dims, strict=True):
        axis = axis_of(dim, rank_of(source))
        size = fake(source).shape[axis]
        if not isinstance(size, int) or not isinstance(shift, int):
            return fail("roll of an axis of any length")
        places[axis] = reader.terms.remainder(reader.terms.add(places[axis], reader.terms.number(-shift)), size)
    return reader.read(source, tuple(places))


def _view(reader: Elements, node: Node, index: Index) -> Term:
    source = source_of(node)
    if fake(source).dtype != fake(node).dtype:
        return fail("a view as another type")
    return reader.read(source, reshaped(reader, list(fake(source).shape), list(fake(node).shape), index))


def _repeat(reader: Elements, node: Node, index: Index) -> Term:
    source = source_of(node)
    shape: list[Any] = [1] * (len(index) - rank_of(source)) + list(fake(source).shape)
    given: Any = node.args[1] if len(node.args) > 1 else ()
    times_each = [1] * (len(index) - len(given)) + list(given)
    places: list[Term] = []
    for size, place, count in zip(shape, index, times_each, strict=True):
        if is_one(count):
            places.append(place)
        elif is_one(size):
            places.append(reader.terms.number(0))
        elif isinstance(size, torch.SymInt):
            return fail("a repeat of an axis of any length")
        else:
            places.append(reader.terms.remainder(place, size))
    return reader.read(source, tuple(places[len(index) - rank_of(source) :]))


def _repeat_interleave(reader: Elements, node: Node, index: Index) -> Term:
    times = node.args[1] if len(node.args) > 1 else None
    dim = argument(node, "dim")
    if not isinstance(times, int) or dim is None:
        return fail("repeat_interleave with counts of its own")
    axis = axis_of(dim, len(index))
    return reader.read(source_of(node), (*index[:axis], reader.terms.divide(index[axis], times), *index[axis + 1 :]))


def _triangle(lower: bool) -> Move:
    def move(reader: Elements, node: Node, index: Index) -> Term:
        t = reader.terms
        diagonal = reader.scalar(node.args[1] if len(node.args) > 1 else 0)
        offset = t.subtract(index[-1], index[-2])
        kept = t.at_most(offset, diagonal) if lower else t.at_most(diagonal, offset)
        zero = t.false if fake(node).dtype == torch.bool else t.number(0)
        return t.choose(kept, reader.read(source_of(node), index), zero)

    return move


def _eye(reader: Elements, node: Node, index: Index) -> Term:
    t = reader.terms
    same = t.equal(index[0], index[1])
    return same if fake(node).dtype == torch.bool else t.as_int(same)


def _complex(reader: Elements, node: Node, index: Index) -> Term:
    """Steps from complex numbers to their parts and back. They are not computed: that equal operands give equal results
    is enough to compare two elements."""
    source, name, t = source_of(node), op_name(node), reader.terms
    if name == "view_as_real":
        part = "real" if index[-1].number == 0 else "imag" if index[-1].number == 1 else ""
        return t.apply(part, (reader.read(source, index[:-1]),), "real") if part else fail(name)
    if name == "view_as_complex":
        parts = (reader.read(source, (*index, t.number(n))) for n in range(2))
        return t.apply("complex", tuple(parts), "real")
    return t.apply(name, tuple(reader.operand(a, index) for a in node.args if isinstance(a, Node)), "real")


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
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "reshape_as", "view_as"), _view),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    "repeat_interleave": _repeat_interleave,
    "tril": _triangle(True),
    "triu": _triangle(False),
    "eye": _eye,
    **dict.fromkeys(
        ("view_as_real", "view_as_complex", "real", "imag", "polar", "complex", "conj", "_conj", "resolve_conj"),
        _complex,
    ),
    **JOINED,
    **SELECTED,
    **SCATTERED,
    **COMBINED,
}
"""By the name of the operator; `split[]` is for one of the pieces that `split` gives."""
