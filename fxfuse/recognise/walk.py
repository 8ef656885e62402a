"""Walking out from an anchor, through the operators that a meaning may be spelled with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.fx import Node

from fxfuse.graph.region import real_users
from fxfuse.graph.view import GraphView, op_name, tensor

Allowed = Callable[[str], bool]


def forward(view: GraphView, start: Node, allowed: Allowed, *, depth: int = 12, limit: int = 40) -> list[Node]:
    """Nodes that `start` reaches through allowed operators, nearest first; `start` is one of them."""
    return _walk(view, start, lambda n: real_users(n), allowed, depth, limit)


def backward(view: GraphView, start: Node, allowed: Allowed, *, depth: int = 12, limit: int = 40) -> list[Node]:
    """Nodes that reach `start` through allowed operators, nearest first. The last of each path need not be allowed."""
    found: list[Node] = []
    seen = {start}
    level = [start]
    for _ in range(depth):
        following = []
        for node in level:
            if node is not start and not allowed(op_name(node)):
                continue
            for i in node.all_input_nodes:
                if i not in seen and i in view.order and len(found) < limit:
                    seen.add(i)
                    found.append(i)
                    following.append(i)
        level = following
    return sorted(found, key=view.order.__getitem__, reverse=True)


def _walk(
    view: GraphView,
    start: Node,
    step: Callable[[Node], list[Node]],
    allowed: Allowed,
    depth: int,
    limit: int,
) -> list[Node]:
    found = [start]
    seen = {start}
    level = [start]
    for _ in range(depth):
        following = []
        for node in level:
            for n in step(node):
                if n not in seen and n in view.order and allowed(op_name(n)) and len(found) < limit:
                    seen.add(n)
                    found.append(n)
                    following.append(n)
        level = following
    return sorted(found, key=view.order.__getitem__)


def chain_back(view: GraphView, node: Node, allowed: Allowed) -> Iterator[Node]:
    """`node`, then each single tensor that it is made from by layout and scaling alone, nearest first.

    Ways that part and meet again (a concatenation of slices) are one; integer tensors (an index) are not on the way.
    """
    cut = {node}
    yield node
    for _ in range(64):
        last = max(cut, key=lambda n: view.order.get(n, -1))
        if last.op != "call_function" or not allowed(op_name(last)):
            return
        cut = (cut - {last}) | {i for i in last.all_input_nodes if _carries(i)}
        if not cut:
            return
        if len(cut) == 1:
            yield next(iter(cut))


def chain_forward(node: Node, allowed: Allowed) -> Iterator[Node]:
    """`node`, then what reads it, as long as that is a single allowed call."""
    yield node
    while True:
        users = real_users(node)
        users = [u for u in users if not _is_size(u)]
        if len(users) != 1 or not allowed(op_name(users[0])) or tensor(users[0]) is None:
            return
        node = users[0]
        yield node


def _carries(node: Node) -> bool:
    value = tensor(node)
    if value is None:
        return not _is_size(node)
    return value.dtype.is_floating_point or value.dtype.is_complex


def _is_size(node: Node) -> bool:
    value = node.meta.get("val")
    return tensor(node) is None and not isinstance(value, (list, tuple))
