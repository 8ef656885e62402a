"""Layouts that undo one another: a reshape of a reshape, a transpose of a transpose."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from fxfuse.graph.view import CAST, fake, op_name, tensor

RESHAPES = frozenset("view reshape flatten unflatten _unsafe_view unsqueeze squeeze".split())
"""Operators that keep the order of the elements."""
_SWAPS = frozenset("transpose swapaxes swapdims".split())


def cancel_layouts(inserted: Iterable[Node]) -> None:
    """Where an inserted layout gives back a tensor that is already there, read that tensor.

    Only inserted nodes are rewired; what they made superfluous is left for dead code removal.
    """
    for node in inserted:
        original = _before_reshapes(node) or _before_swaps(node)
        if original is not None:
            node.replace_all_uses_with(original, propagate_meta=False)


def _before_reshapes(node: Node) -> Node | None:
    """The earliest tensor that a chain of reshapes ending here started from with this very shape and strides."""
    found = None
    current = node
    while op_name(current) in RESHAPES or (op_name(current) in CAST and current is not node):
        source = current.args[0]
        if not isinstance(source, Node) or tensor(source) is None:
            break
        if fake(source).dtype != fake(current).dtype:
            break
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


def _geometry(node: Node) -> tuple[str, str]:
    value = fake(node)
    return str(tuple(value.shape)), str(value.stride())
