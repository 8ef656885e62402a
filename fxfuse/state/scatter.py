"""The inverse of a view: what the tensor behind it becomes once the view holds other values."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from fxfuse.graph.view import argument, fake, op_name, tensor

_PIECES = frozenset(["split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk", "tensor_split"])
_SWAPS = frozenset(["transpose", "swapaxes", "swapdims", "t", "mT"])
_ALL_OF_IT = frozenset(["view", "unflatten", "squeeze", "unsqueeze"])
"""Views that hold every element of what they are of, in the same order."""
_SAME = frozenset(["detach", "alias"])

Call = tuple[Any, tuple[Any, ...]]


def can_scatter(view: Node) -> bool:
    """Can `scattered` write down what the tensor behind this view becomes, once the view holds other values?"""
    name = op_name(view)
    if name == "getitem":
        source = view.args[0]
        return isinstance(source, Node) and op_name(source) in _PIECES and _piece(view, source) is not None
    if name == "narrow":
        return all(isinstance(a, int) for a in view.args[1:]) and int(view.args[2]) >= 0  # type: ignore[arg-type]
    return name in _PIECES | _SWAPS | _ALL_OF_IT | _SAME | {"slice", "select", "permute", "diagonal"}


def scattered(graph: Graph, view: Node, before: Node, value: Node) -> Node:
    """The node for the tensor behind `view`, once the view holds `value`; it is inserted where the graph inserts.

    Args:
        before: the tensor's value until then.
    """
    target, args = _call(view, before, value)
    return value if target is None else graph.call_function(target, args)


def _call(view: Node, before: Node, value: Node) -> Call:
    aten, name = torch.ops.aten, op_name(view)
    if name in _SAME:
        return None, ()
    if name == "slice":
        dim, start, end, step = (argument(view, n) for n in ("dim", "start", "end", "step"))
        return aten.slice_scatter.default, (before, value, dim, start, end, step)
    if name == "select":
        return aten.select_scatter.default, (before, value, *view.args[1:3])
    if name == "narrow":
        dim, start, length = view.args[1:4]
        return aten.slice_scatter.default, (before, value, dim, start, int(start) + int(length))  # type: ignore[arg-type]
    if name == "diagonal":
        offset, one, two = (argument(view, n) for n in ("offset", "dim1", "dim2"))
        return aten.diagonal_scatter.default, (before, value, offset, one, two)
    if name == "getitem":
        source = view.args[0]
        assert isinstance(source, Node)
        piece = _piece(view, source)
        assert piece is not None
        axis, start, length = piece
        if length is None:
            return aten.select_scatter.default, (before, value, axis, start)
        return aten.slice_scatter.default, (before, value, axis, start, start + length)
    if name in ("t", "mT"):
        return aten.transpose.int, (value, -2, -1) if fake(view).dim() > 1 else (value, 0, 0)
    if name in _SWAPS:
        return aten.transpose.int, (value, *view.args[1:3])
    if name == "permute":
        order: Any = view.args[1]
        back = [0] * len(order)
        for place, axis in enumerate(order):
            back[axis % len(order)] = place
        return aten.permute.default, (value, back)
    return aten.reshape_as.default, (value, before)


def _piece(view: Node, source: Node) -> tuple[int, int, int | None] | None:
    """Axis, start and length of one piece of a split; a piece of `unbind`, which has no such axis, has no length.

    None where they are not known.
    """
    pieces, whole, place = source.meta.get("val"), source.args[0], view.args[1]
    if not isinstance(whole, Node) or tensor(whole) is None or not isinstance(place, int):
        return None
    axis = argument(source, "dim")
    if not isinstance(axis, int) or not isinstance(pieces, (list, tuple)):
        return None
    axis, place = axis % fake(whole).dim(), place % len(pieces)
    if op_name(source) == "unbind":
        return axis, place, None
    lengths = [piece.shape[axis] for piece in pieces]
    if not all(isinstance(n, int) for n in lengths):
        return None
    return axis, sum(lengths[:place]), lengths[place]
