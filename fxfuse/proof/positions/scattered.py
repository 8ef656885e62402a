"""Elements of what was written through a view: of the new value within the view, of the old one elsewhere."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from fxfuse.graph.view import argument, fake
from fxfuse.proof.arithmetic import narrowed
from fxfuse.proof.positions.axes import at, axis_of, start_of
from fxfuse.proof.positions.elements import Elements, Index, dtype_of
from fxfuse.proof.positions.terms import Term, Unreadable


def slice_scatter(reader: Elements, node: Node, index: Index) -> Term:
    old, new, t = *_two(node), reader.terms
    axis, step = axis_of(argument(node, "dim"), fake(node).dim()), argument(node, "step")
    if not isinstance(step, int):
        raise Unreadable("a slice with a step that is not written")
    begin = start_of(reader, old, axis, argument(node, "start"))
    place = t.subtract(index[axis], begin)
    within = [t.at_most(t.number(0), place)]
    if step > 1:
        within.append(t.equal(t.remainder(place, step), t.number(0)))
        place = t.divide(place, step)
    within.append(t.less(place, reader.shape(new)[axis]))
    inside = t.every(within)
    return _either(reader, node, inside, (*index[:axis], place, *index[axis + 1 :]), index)


def select_scatter(reader: Elements, node: Node, index: Index) -> Term:
    old, _ = _two(node)
    axis = axis_of(node.args[2], fake(node).dim())
    wanted = at(reader, old, axis, reader.scalar(node.args[3]))
    inside = reader.terms.equal(index[axis], wanted)
    return _either(reader, node, inside, (*index[:axis], *index[axis + 1 :]), index)


def copy(reader: Elements, node: Node, index: Index) -> Term:
    """``copy(x, y)``: y, in the type and shape of x."""
    old, new = _two(node)
    return narrowed(reader.terms, reader.operand(new, index), fake(new).dtype, fake(old).dtype)


def fill(reader: Elements, node: Node, index: Index) -> Term:
    value = node.args[1] if len(node.args) > 1 else 0  # `zero`
    return narrowed(reader.terms, reader.scalar(value), dtype_of(value), fake(node).dtype)


SCATTERED: dict[str, Any] = {
    "slice_scatter": slice_scatter,
    "select_scatter": select_scatter,
    "copy": copy,
    "fill": fill,
    "zero": fill,
}


def _two(node: Node) -> tuple[Node, Node]:
    old, new = node.args[:2]
    assert isinstance(old, Node) and isinstance(new, Node)
    return old, new


def _either(reader: Elements, node: Node, inside: Term, place: Index, index: Index) -> Term:
    """The new value where it is inside, read nowhere else."""
    t, (old, new) = reader.terms, _two(node)
    if inside is t.true:
        return reader.read(new, place)
    if inside is t.false:
        return reader.read(old, index)
    return t.choose(inside, reader.read(new, place), reader.read(old, index))
