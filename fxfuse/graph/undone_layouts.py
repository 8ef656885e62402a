"""Layouts that undo one another: a reshape of a reshape, a transpose of a transpose."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node

from fxfuse.graph.view import CAST, fake, op_name, size_text, tensor

RESHAPES = frozenset(["view", "reshape", "flatten", "unflatten", "_unsafe_view", "unsqueeze", "squeeze"])
"""Operators that keep the order of the elements."""
_SWAPS = frozenset(["transpose", "swapaxes", "swapdims"])


def cancel_layouts(inserted: Iterable[Node]) -> None:
    """Where an inserted layout gives back a tensor that is already there, read that tensor.

    A cast on the way is done on that tensor instead: reshape(cast(reshape(x))) becomes cast(x). Only inserted nodes
    are rewired; what they made superfluous is left for dead code removal.
    """
    for node in inserted:
        original = _before_reshapes(node) or _before_swaps(node)
        if original is None:
            continue
        if fake(original).dtype != fake(node).dtype:
            with node.graph.inserting_before(node):
                cast = node.graph.call_function(torch.ops.aten.to.dtype, (original, fake(node).dtype))
            cast.meta = {**node.meta}
            original = cast
        node.replace_all_uses_with(original, propagate_meta=False)


def _before_reshapes(node: Node) -> Node | None:
    """The earliest tensor of this very shape and strides that reshapes, and casts of one kind, lead here from."""
    found = None
    current = node
    casts: list[torch.dtype] = []
    while op_name(current) in RESHAPES or (op_name(current) in CAST and current is not node):
        source = current.args[0]
        if not isinstance(source, Node) or tensor(source) is None:
            break
        if fake(source).dtype != fake(current).dtype:
            casts.append(fake(current).dtype)
            if len(casts) > 1 or not fake(source).dtype.is_floating_point:
                break  # of two casts the inner one may round, and cannot be left out
        current = source
        if _geometry(current) == _geometry(node):
            found = current
    return found


def _before_swaps(node: Node) -> Node | None:
    """x for transpose(transpose(x, a, b), a, b)."""
    if op_name(node) not in _SWAPS or not isinstance(inner := node.args[0], Node):
        return None
    source = inner.args[0] if inner.args else None
    swapped = op_name(inner) in _SWAPS or op_name(inner) == "permute"
    if not swapped or not isinstance(source, Node) or _geometry(source) != _geometry(node):
        return None
    rank = fake(node).dim()
    return source if _axes(node, rank) == _axes(inner, rank) else None


def _axes(node: Node, rank: int) -> set[int]:
    """The two axes that change places."""
    if op_name(node) == "permute":
        order = node.args[1]
        assert isinstance(order, (list, tuple))
        return {a for a, b in enumerate(order) if isinstance(b, int) and b % rank != a}
    return {a % rank for a in node.args[1:3] if isinstance(a, int)}


def _geometry(node: Node) -> tuple[tuple[str, ...], tuple[str, ...]]:
    value = fake(node)
    return tuple(map(size_text, value.shape)), tuple(map(size_text, value.stride()))
