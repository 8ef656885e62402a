"""A call as a key: equal keys, equal values. What only cuts, turns or casts has one spelling of its own.

`x[:, 5:]`, `x[:, 5:12]` of an axis of 12, `x.narrow(1, 5, 7)` and a piece of `x.split([5, 7], 1)` are one cut. A size
is what it is, whichever tensor was asked.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch.fx import Node

from fxfuse.graph.view import CAST, argument, is_size, op_name, size_text, static, tensor

_SPLITS = frozenset(["split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"])
_TURNS = frozenset(["transpose", "swapaxes", "swapdims", "permute", "t", "numpy_T", "mT"])
_SHAPED = frozenset(["view", "reshape", "_unsafe_view", "expand"])


def call_of(node: Node, first: Mapping[Node, Node]) -> Hashable:
    """The key of a call that is pure.

    Args:
        first: nodes that are read for others.
    """
    base = node.args[0] if node.args else None
    if isinstance(base, Node):
        whole = first.get(base, base)
        name = op_name(node)
        if name == "getitem" and (piece := _piece(node, base, first)) is not None:
            return piece
        value, source = tensor(node), tensor(base)
        if value is not None and source is not None:
            if name in ("slice", "narrow") and (cut := _cut(node, whole, source, first)) is not None:
                return cut
            if name == "select" and isinstance(argument(node, "index"), int):
                axis = _axis(argument(node, "dim"), source.dim())
                return "select", whole, axis, _from_front(argument(node, "index"), source.shape[axis], first)
            if name in _TURNS and (order := _order(node, name, source.dim())) is not None:
                return "turn", whole, order
            if name in _SHAPED:
                return str(node.target), whole, tuple(map(size_text, value.shape))
            if name in CAST and not (argument(node, "memory_format") or argument(node, "copy")):
                return "cast", whole, value.dtype, value.device, value.layout
    return node.target, _literal(node.args, first), _literal(dict(node.kwargs), first)


def cut_whole(node: Node) -> Node | None:
    """The tensor that a slice takes whole, as ``x[:]`` does; None of any other node."""
    base = node.args[0] if op_name(node) == "slice" else None
    value, source = tensor(node), tensor(base) if isinstance(base, Node) else None
    if value is None or source is None or argument(node, "start") not in (0, None) or argument(node, "step") != 1:
        return None
    alike = tuple(map(size_text, value.shape)) == tuple(map(size_text, source.shape))
    return base if alike and isinstance(base, Node) else None


def _cut(node: Node, whole: Node, source: torch.Tensor, first: Mapping[Node, Node]) -> Hashable | None:
    axis = _axis(argument(node, "dim"), source.dim())
    step = argument(node, "step") if op_name(node) == "slice" else 1
    start, value = argument(node, "start"), tensor(node)
    if not isinstance(step, int) or value is None:
        return None
    start = _from_front(0 if start is None else start, source.shape[axis], first)
    return "cut", whole, axis, start, size_text(value.shape[axis]), step


def _piece(node: Node, split: Node, first: Mapping[Node, Node]) -> Hashable | None:
    """An element of what a split or an unbind gives."""
    whole, place = split.args[0] if split.args else None, node.args[1]
    pieces = split.meta.get("val")
    if not isinstance(whole, Node) or not isinstance(place, int) or not isinstance(pieces, (list, tuple)):
        return None
    source = tensor(whole)
    if source is None or op_name(split) not in _SPLITS | {"unbind"}:
        return None
    axis, whole = _axis(argument(split, "dim"), source.dim()), first.get(whole, whole)
    place %= len(pieces)
    if op_name(split) == "unbind":
        return "select", whole, axis, _literal(place, first)
    sizes = [static(piece.shape[axis]) for piece in pieces]
    start = 0
    for size in sizes[:place]:
        if size is None:
            return None
        start += size
    return "cut", whole, axis, _literal(start, first), size_text(pieces[place].shape[axis]), 1


def _order(node: Node, name: str, rank: int) -> tuple[int, ...] | None:
    order = list(range(rank))
    if name == "permute":
        return tuple(_axis(d, rank) for d in argument(node, "dims"))
    if name in ("t", "numpy_T"):
        return tuple(reversed(order)) if rank == 2 else None
    if name == "mT":
        one, two = rank - 2, rank - 1
    else:
        one, two = (_axis(d, rank) for d in node.args[1:3])
    order[one], order[two] = order[two], order[one]
    return tuple(order)


def _axis(dim: Any, rank: int) -> int:
    return int(dim) % max(rank, 1)


def _from_front(place: Any, size: Any, first: Mapping[Node, Node]) -> Hashable:
    length = static(size)
    if isinstance(place, int) and length is not None:
        place = min(max(place + length if place < 0 else place, 0), length)
    return _literal(place, first)


def _literal(arg: Any, first: Mapping[Node, Node]) -> Hashable:
    if isinstance(arg, Node):
        if is_size(arg):
            value = arg.meta["val"]
            return type(value).__name__.replace("Sym", "").lower(), size_text(value)
        return "node", first.get(arg, arg)
    if isinstance(arg, (list, tuple)):
        return tuple(_literal(a, first) for a in arg)
    if isinstance(arg, dict):
        return tuple((k, _literal(v, first)) for k, v in sorted(arg.items()))
    return type(arg).__name__, repr(arg)
