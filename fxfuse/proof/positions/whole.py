"""Between which numbers an integer tensor's elements lie, told from its type and from the operators that compute it."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fxfuse.graph.view import CAST, LAYOUT, argument, op_name, tensor

Bounds = tuple[int, int]
_SHIFTS = frozenset(["__rshift__", "bitwise_right_shift"])
_MASKS = frozenset(["__and__", "bitwise_and"])


def bounds(node: Any, depth: int = 12) -> Bounds | None:
    """The least and the greatest that a node of integers, or a number, can be; None where that is not known."""
    if isinstance(node, bool) or (isinstance(node, int) and not isinstance(node, bool)):
        return int(node), int(node)
    value = tensor(node) if isinstance(node, Node) else None
    if value is None or value.dtype.is_floating_point or value.dtype.is_complex:
        return None
    own = of_type(value.dtype)
    found = _computed(node, depth) if depth > 0 and node.op == "call_function" else None
    if found is None:
        return own
    return found if own[0] <= found[0] and found[1] <= own[1] else own  # what leaves its type wraps around


def cannot_wrap(node: Node) -> bool:
    """Is what this sum, difference or product of whole numbers comes to known to fit into its type?"""
    value = tensor(node)
    if op_name(node) not in ("add", "sub", "rsub", "mul") or value is None or value.dtype.is_floating_point:
        return False
    own, found = of_type(value.dtype), _computed(node, 12)
    return found is not None and own[0] <= found[0] and found[1] <= own[1]


def of_type(dtype: torch.dtype) -> Bounds:
    if dtype == torch.bool:
        return 0, 1
    info = torch.iinfo(dtype)
    return info.min, info.max


def _computed(node: Node, depth: int) -> Bounds | None:
    name = op_name(node)
    if name in CAST or (name in LAYOUT and name not in ("cat", "concat", "concatenate", "stack", "hstack")):
        return bounds(node.args[0], depth - 1)
    if name in ("cat", "stack"):
        parts = [bounds(p, depth - 1) for p in node.args[0]]  # type: ignore[union-attr]
        known = [p for p in parts if p is not None]
        return (min(p[0] for p in known), max(p[1] for p in known)) if len(known) == len(parts) else None
    if len(node.args) < 2:
        return None
    a, b = (bounds(node.args[i], depth - 1) for i in (0, 1))
    if name in _MASKS and (mask := next((m for m in (b, a) if m is not None and m[0] >= 0), None)) is not None:
        return 0, mask[1]
    if a is None or b is None:
        return None
    if name in ("add", "sub", "rsub"):
        if argument(node, "alpha") not in (None, 1):
            return None
        a, b = (b, a) if name == "rsub" else (a, b)
        return (a[0] + b[0], a[1] + b[1]) if name == "add" else (a[0] - b[1], a[1] - b[0])
    if name == "mul":
        products = [x * y for x in a for y in b]
        return min(products), max(products)
    if name in _SHIFTS and b[0] == b[1] and 0 <= b[0] < 64:
        return a[0] >> b[0], a[1] >> b[0]
    return None
