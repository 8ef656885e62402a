"""Finds the tensors of a graph that are written to in place, and whose writes nothing outside of the graph can see.
Each makes a family: the tensor, its views, and the writes to any of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.fx import Graph, Node

from fxfuse.graph.view import ASSERTIONS, bases, fake, is_size, mutated, op_name, size_text, storage_roots, tensor
from fxfuse.state.scatter import can_scatter
from fxfuse.state.writes import shares_storage
from fxfuse.torch_seams import OpOverload, overload_name, schema_of

_SHAPES = frozenset(
    ["resize_", "resize_as_", "set_", "squeeze_", "unsqueeze_", "transpose_", "swapaxes_", "swapdims_", "t_"]
)
"""Operators with a name like that of a write, which change the shape of a tensor and no element."""

Found = tuple[Node, dict[Node, Node], set[Node], list[Node]]
"""A family: the tensor; by view, what it is a view of; what may be a view or a copy; the writes in their order."""


def private_families(graph: Graph) -> Iterator[Found]:
    """The families whose writes can all be read as the values that they compute."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    writers = [n for n in graph.nodes if mutated(n)]
    refused: set[Node] = set()
    by_root: dict[Node, list[Node]] = {}
    for writer in writers:
        root = _root(writer)
        if root is None:
            refused |= {r for r in mutated(writer) if not bases(r)}
        else:
            by_root.setdefault(root, []).append(writer)
    found: list[Found] = []
    for root, mine in by_root.items():
        source, copies = _views(root)
        alone = _copies_are_read_early(copies, mine, order)
        if bases(root):
            alone = alone and _nothing_else_is_read(root, {root, *source, *copies}, order[mine[0]], order)
        if alone:
            found.append((root, source, copies, mine))
        else:
            refused |= {r for r in storage_roots(root) if not bases(r)}
    yield from (one for one in found if one[0] not in refused)


def written_to(writer: Node) -> Node | None:
    """The tensor that a write writes to: its first argument, or what it was given as `out`."""
    found = writer.kwargs.get("out", writer.args[0] if writer.args else None)
    return found if isinstance(found, Node) else None


def functional_of(node: Node) -> OpOverload | None:
    """The operator that computes what this node writes: `aten.mul.Tensor` for `aten.mul_.Tensor` or `aten.mul.out`.

    None where there is none that takes the same arguments and gives the same dtype and shape.
    """
    if isinstance(out := node.kwargs.get("out"), Node):
        return _without_out(node, out)
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload):
        return None
    namespace, _, name = schema_of(target).name.partition("::")
    random = torch.Tag.nondeterministic_seeded in target.tags
    if namespace != "aten" or not name.endswith("_") or name.endswith("__") or name in _SHAPES or random:
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    functional: OpOverload | None = getattr(packet, overload_name(target), None) if packet is not None else None
    value, own = node.meta.get("val"), node.args[0] if node.args else None
    if functional is None or not isinstance(own, Node) or value is None:
        return None
    if name in ("copy_", "fill_", "index_put_", "masked_fill_", "masked_scatter_"):
        return functional  # in the type of what is written to
    return functional if _keeps_type(node) else None


def _without_out(node: Node, out: Node) -> OpOverload | None:
    target, value, written = node.target, tensor(node), tensor(out)
    if not isinstance(target, OpOverload) or value is None or written is None or not _keeps_type(node):
        return None
    if torch.Tag.nondeterministic_seeded in target.tags:
        return None
    if tuple(map(size_text, value.shape)) != tuple(map(size_text, written.shape)):
        return None  # it was given another shape
    wanted = [(a.name, str(a.type)) for a in schema_of(target).arguments if a.name != "out"]
    for name in target.overloadpacket.overloads():
        overload: OpOverload = getattr(target.overloadpacket, name)
        if [(a.name, str(a.type)) for a in schema_of(overload).arguments] == wanted:
            return overload
    return None


def _keeps_type(node: Node) -> bool:
    """Is what a write computes of the dtype of the tensor that it writes to, so that it is not converted on the way?"""
    kind = fake(node).dtype
    operands = [v for i in node.all_input_nodes if (v := tensor(i)) is not None and v.dim() > 0]
    return all(v.dtype in (kind, torch.bool) for v in operands)


def _root(writer: Node) -> Node | None:
    """The tensor that a write ends up in, behind all views; None where that is not clear, or can be seen outside."""
    if functional_of(writer) is None:
        return None
    node = written_to(writer)
    while isinstance(node, Node) and (of := bases(node)):
        if not shares_storage(node):
            break  # it may be a copy: if what it may be a view of is not read any more, that is all the same
        if not (mutated(node) or can_scatter(node)):
            return None
        node = of[0]
    if not isinstance(node, Node) or node.op != "call_function" or tensor(node) is None:
        return None  # what is written to an input or a buffer is seen outside
    schema = schema_of(node.target)
    return None if schema is None or schema.is_mutable else node


def _nothing_else_is_read(root: Node, own: set[Node], first: int, order: dict[Node, int]) -> bool:
    """For a tensor that may be a view of another, or a copy: is that other one not read any more after the first write,
    so that it is all the same which of the two it is?"""
    behind = storage_roots(root) - {root}
    if any(node.op == "placeholder" for node in behind):
        return False
    stack, seen = list(behind), set(behind)
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in own or op_name(user) in ASSERTIONS or is_size(user):
                continue
            if order[user] > first:
                return False
            if node in bases(user) and user not in seen:
                seen.add(user)
                stack.append(user)
    return True


def _views(root: Node) -> tuple[dict[Node, Node], set[Node]]:
    """What is for certain a view of the tensor, each with what it is a view of; and what may be a view or a copy."""
    source: dict[Node, Node] = {}
    copies: set[Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        for user in node.users:
            if node not in bases(user) or user in source or user in copies:
                continue
            if node in copies or not shares_storage(user):
                copies.add(user)
            else:
                source[user] = node
            stack.append(user)
    return source, copies


def _copies_are_read_early(copies: Iterable[Node], writers: list[Node], order: dict[Node, int]) -> bool:
    """Is whatever may be a view or a copy read only before the writes that a view would show?"""
    for copy in copies:
        before = bases(copy)[0]
        if tensor(copy) is not None and tensor(before) is not None and fake(copy).dtype != fake(before).dtype:
            continue  # for certain a copy, and what is made of it
        made = min(order[n] for n in storage_roots(copy) & {*copies})
        later = [order[w] for w in writers if order[w] > made]
        readers = (u for u in copy.users if op_name(u) not in ASSERTIONS and not is_size(u))
        if later and any(order[u] > later[0] for u in readers):
            return False
    return True
