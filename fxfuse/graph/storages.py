"""Which nodes may share their storage, and which of them are written to in place."""

from __future__ import annotations

from torch.fx import Node

from fxfuse.graph.blocks.wrapped import Wrapped, block
from fxfuse.graph.nodes import op_name
from fxfuse.graph.vocabulary import ALIASES
from fxfuse.torch_seams import schema_of


def storage_roots(node: Node) -> set[Node]:
    """The nodes whose storage this node may share: itself, and back through everything that may be a view.

    A view's first argument is what it is a view of.
    """
    roots: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in roots:
            continue
        roots.add(current)
        stack.extend(bases(current))
    return roots


def touches(node: Node, written: set[Node]) -> bool:
    """Does it read one of these storages, or may its value be in one?"""
    return bool(written) and any(storage_roots(n) & written for n in (node, *node.all_input_nodes))


def bases(node: Node) -> list[Node]:
    """The nodes whose storage its value may be a view of, or that it may be itself."""
    if (inside := block(node)) is not None:
        return [o for o in inside.operands if isinstance(o, Node)]
    if node.op == "call_function" and isinstance(out := node.kwargs.get("out"), Node):
        return [out]
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return []
    schema = schema_of(node.target)
    aliases = schema is not None and any(r.alias_info is not None for r in schema.returns)
    return [node.args[0]] if aliases or op_name(node) in ALIASES else []


def mutated(node: Node) -> set[Node]:
    """The storages that this node writes to in place."""
    if (inside := block(node)) is not None:
        return _mutated_inside(inside)
    schema = schema_of(node.target) if node.op == "call_function" else None
    if schema is None or not schema.is_mutable:
        return set()
    found: set[Node] = set()
    for position, arg in enumerate(schema.arguments):
        if arg.alias_info is not None and arg.alias_info.is_write:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(arg.name)
            for target in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(target, Node):
                    found |= storage_roots(target)
    return found


def _mutated_inside(inside: Wrapped) -> set[Node]:
    """Of a subgraph, the storages of operands that it writes to."""
    given = [n for n in inside.nodes if n.op == "placeholder"]
    written = {root for n in inside.nodes for root in mutated(n)}
    operands = [o for n, o in zip(given, inside.operands, strict=True) if n in written and isinstance(o, Node)]
    return {root for operand in operands for root in storage_roots(operand)}
