"""In-place arithmetic on intermediates, read as what it computes.

The training IR keeps `q.mul_(scale)` as written. Where nothing else can see the write, it is read as `q * scale` while
regions are matched; whatever no fused region took in is written back as it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from fxfuse.graph.view import storage_roots


@dataclass(frozen=True)
class InPlace:
    """One write that is read functionally for now."""

    node: Node
    target: Node
    operator: torch._ops.OpOverload
    users: tuple[Node, ...]
    """Users that read `target` after the write, and were pointed to the result."""


def functionalise(graph: Graph) -> list[InPlace]:
    """Read in-place arithmetic as functional where that is the same; returns what `restore` needs."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    writes: list[InPlace] = []
    for node in list(graph.nodes):
        functional = _functional(node)
        if functional is None:
            continue
        target = node.args[0]
        if not isinstance(target, Node) or not _private(node, target, order):
            continue
        users = tuple(u for u in target.users if order[u] > order[node])
        writes.append(InPlace(node, target, node.target, users))
        node.target = functional
        for user in users:
            user.replace_input_with(target, node)
    return writes


def restore(graph: Graph, writes: list[InPlace]) -> None:
    """Write back what is still in the graph, with the input that it had."""
    alive = set(graph.nodes)
    for write in reversed(writes):
        if write.node not in alive or write.target not in write.node.all_input_nodes:
            continue
        write.node.target = write.operator
        for user in write.users:
            if user in alive and write.node in user.all_input_nodes:
                user.replace_input_with(write.node, write.target)


def _functional(node: Node) -> torch._ops.OpOverload | None:
    """`aten.mul.Tensor` for `aten.mul_.Tensor`: same arguments, result of the same dtype."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    namespace, _, name = target._schema.name.partition("::")
    if namespace != "aten" or not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    functional = getattr(packet, target._overloadname, None) if packet is not None else None
    value, own = node.meta.get("val"), node.args[0] if node.args else None
    if functional is None or not isinstance(own, Node) or value is None:
        return None
    operands = [i.meta["val"] for i in node.all_input_nodes if isinstance(i.meta.get("val"), torch.Tensor)]
    promoted = [v.dtype for v in operands if v.dim() > 0]
    return functional if all(d in (value.dtype, torch.bool) for d in promoted) else None


def _private(node: Node, target: Node, order: dict[Node, int]) -> bool:
    """Is the written storage read after the write through `target` and the result only?"""
    roots = storage_roots(target)
    if any(r.op == "placeholder" for r in roots):
        # Views of an input or a buffer: the write is seen outside. A copy may have been made on the way, but
        # `storage_roots` cannot tell.
        return False
    stale = [a for a in _aliases_of(roots) if a is not target and order[a] < order[node]]
    return not any(order[u] > order[node] for a in stale for u in a.users)


def _aliases_of(roots: set[Node]) -> set[Node]:
    """Every node that may share storage with one of these."""
    found = set(roots)
    stack = list(roots)
    while stack:
        for user in stack.pop().users:
            if user not in found and user.op == "call_function" and storage_roots(user) & roots:
                found.add(user)
                stack.append(user)
    return found
