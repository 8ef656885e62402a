"""Blocks in which nothing was fused leave as they came: one call again, of the subgraph that they were."""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram
from torch.fx import Graph, Node

from fxfuse.graph.blocks.inline import Blocks, Inlined, Saved
from fxfuse.graph.program import drop_unused_subgraphs, name_outputs
from fxfuse.torch_seams import pytree


def put_back(program: ExportedProgram, blocks: Blocks) -> None:
    """Make a block again of whatever is as it was inlined."""
    alive = set(program.graph.nodes)
    for one in blocks.outer:
        _put_back(program.graph, blocks, one, alive)
    drop_unused_subgraphs(program)
    name_outputs(program)


def _put_back(graph: Graph, blocks: Blocks, one: Inlined, alive: set[Node]) -> None:
    if not _is_intact(blocks, one, alive):
        for nested in one.nested:
            if not nested.ambient:
                _put_back(graph, blocks, nested, alive)
        return
    inside = one.nodes & alive
    ordered = [n for n in graph.nodes if n in inside]
    names = {n.name for n in graph.nodes}
    with graph.inserting_before(ordered[0]):
        reference = _made(graph.get_attr(str(one.reference.target)), one.reference, names)
        operands = [one.operands.get(n, given) for n, given in one.given]
        call = graph.call_function(one.call.target, (*one.inside.mode, reference, *operands))
        _made(call, one.call, names)
        for saved, position in one.taken:
            took = _made(graph.call_function(saved.target, (call, position)), saved, names)
            value = one.results[position]
            for user in list(value.users) if isinstance(value, Node) and value in inside else ():
                if user not in inside:
                    user.replace_input_with(value, took)
    for node in reversed(ordered):
        graph.erase_node(node)


def _made(node: Node, saved: Saved, names: set[str]) -> Node:
    if saved.name not in names:
        node.name = saved.name
    node.meta = saved.meta
    return node


def _is_intact(blocks: Blocks, one: Inlined, alive: set[Node]) -> bool:
    """Does everything stand as it was inlined, and read what it read?"""
    if not one.copies or False in [_is_intact(blocks, nested, alive) for nested in one.nested]:
        return False
    one.operands = {}
    inner = {nested.call.name: nested for nested in one.nested}
    for node, copied in one.copies.items():
        if copied in blocks.moved:
            continue
        if copied in alive:
            now = _read_now(copied, one.added)
            if copied.target != node.target and node.op != "get_attr":
                return False
        elif (nested := inner.get(copied.name)) is not None:
            now = [*nested.inside.mode, None, *(nested.operands.get(n, given) for n, given in nested.given)]
        elif node.op == "get_attr" and not copied.users:
            continue  # it belongs to a block within this one
        else:
            return False
        if not _same_reading(blocks, one, _flat((node.args, node.kwargs)), now):
            return False
    if any(isinstance(g, Node) and n not in one.operands and g not in alive for n, g in one.given):
        return False
    results = {r for r in one.results if isinstance(r, Node)}
    inside = one.nodes
    return all(u in inside for n in inside & alive if n not in results for u in n.users)


def _same_reading(blocks: Blocks, one: Inlined, before: list[Any], now: list[Any]) -> bool:
    if len(before) != len(now):
        return False
    for was, value in zip(before, now, strict=True):
        if not isinstance(was, Node):
            if was is not value and repr(was) != repr(value):
                return False
        elif was.op == "placeholder":
            if one.operands.setdefault(was, value) is not value:
                return False
        elif was.op == "get_attr" and value is None:
            continue
        elif blocks.now(one.copies[was]) is not value:
            return False
    return True


def _read_now(copied: Node, added: set[Node]) -> list[Any]:
    """What a copy is given; behind a cast that was written down, what is cast."""
    return [a.args[0] if isinstance(a, Node) and a in added else a for a in _flat((copied.args, copied.kwargs))]


def _flat(arguments: Any) -> list[Any]:
    return list(pytree.tree_leaves(arguments, is_leaf=lambda a: isinstance(a, Node)))
