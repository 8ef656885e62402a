"""Taking out what a rewrite left unread where `torch.func.vmap` was captured.

A captured vmap is a bracket of calls that nothing reads and that change how everything between them runs:

    _vmap_increment_nesting(S); _add_batch_dim(x, 0, 1); …; _remove_batch_dim(y, 1, S, 0); _vmap_decrement_nesting()

`create_block_mask` in `forward` leaves several, with sorts, in-place writes and assertions, which flex_attention alone
reads. Dead code elimination takes the halves of a bracket for dead and what is in between for alive, or the other way
round. Here a bracket goes whole, when everything in it is dead, or stays whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch.fx import Graph, Node

from fxfuse.graph.equal import MERGED
from fxfuse.graph.view import is_pure, mutated, op_name
from fxfuse.torch_seams import (
    ADD_BATCH_DIM,
    REMOVE_BATCH_DIM,
    VMAP_CLOSES,
    VMAP_OPENS,
    VMAP_PREPARES,
    close_vmap,
    vmap_level,
)

_BATCHES = frozenset([ADD_BATCH_DIM, REMOVE_BATCH_DIM])


@dataclass(frozen=True)
class Bracket:
    """One vmap: its own calls, and all nodes from the first of them to the last."""

    own: tuple[Node, ...]
    nodes: frozenset[Node]


def brackets(graph: Graph) -> list[Bracket]:
    """The vmaps of a graph, inner before outer."""
    nodes = list(graph.nodes)
    found: list[Bracket] = []
    opened: list[list[int]] = []
    prepared: list[int] = []
    for position, node in enumerate(nodes):
        name = _function(node)
        if name == VMAP_PREPARES:
            prepared.append(position)
        elif name == VMAP_OPENS:
            opened.append([*prepared, position])
            prepared = []
        elif name == VMAP_CLOSES and opened:
            own = [*opened.pop(), position]
            found.append(Bracket(tuple(nodes[i] for i in own), frozenset(nodes[own[0] : position + 1])))
    return found


def with_brackets(nodes: Iterable[Node]) -> list[Node]:
    """The nodes, and the brackets that they stand in, in graph order: what is to be run to have their values."""
    wanted = dict.fromkeys(nodes)
    if not wanted:
        return []
    graph = next(iter(wanted)).graph
    around = [b for b in brackets(graph) if any(n in wanted for n in b.nodes if n not in b.own)]
    if not around:
        return list(wanted)
    wanted.update(dict.fromkeys(n for b in around for n in b.own))
    return [n for n in graph.nodes if n in wanted]


@contextmanager
def vmaps_closed() -> Iterator[None]:
    """Close the vmaps that were opened in the block and not closed, because running a bracket failed halfway."""
    before = vmap_level()
    try:
        yield
    finally:
        while vmap_level() > before:
            close_vmap()


def remove_unread(graph: Graph, starts: Iterable[Node]) -> None:
    """Erase what nothing reads among `starts` and what is connected with them, brackets of vmap whole.

    Nothing is done to a graph without brackets, nor to dead code that was there before and has no part in `starts`.
    """
    around = brackets(graph)
    if not around:
        return
    dead = _dead(graph, around)
    inside = {n: b for b in reversed(around) for n in b.nodes}  # the innermost
    erased: set[Node] = set()
    pending = [n for n in starts if n in dead]
    while pending:
        node = pending.pop()
        if node in erased:
            continue
        erased.add(node)
        neighbours = [*node.all_input_nodes, *node.users, *(inside[node].nodes if node in inside else ())]
        pending.extend(n for n in neighbours if n in dead)
    for node in reversed(list(graph.nodes)):
        if node in erased:
            graph.erase_node(node)


def _dead(graph: Graph, around: list[Bracket]) -> set[Node]:
    """What neither the outputs nor any effect depends on."""
    own = {n for b in around for n in b.own}
    writes = {n: roots for n in graph.nodes if (roots := mutated(n))}
    dead = {n for n in graph.nodes if n in own or n in writes or _removable(n)}
    changed = True
    while changed:
        alive = {n for n in dead if any(u not in dead for u in n.users)}
        # A write is needed as long as anything that shares the storage is.
        alive |= {n for n, roots in writes.items() if n in dead and any(r not in dead for r in roots)}
        for bracket in around:
            if any(n not in dead or n in alive for n in bracket.nodes):
                alive |= bracket.nodes & dead
        changed = bool(alive)
        dead -= alive
    return dead


def _removable(node: Node) -> bool:
    """Would nothing be missed if nobody read it?"""
    if MERGED in node.meta:
        return False
    if node.op == "get_attr" or is_pure(node) or _function(node) in _BATCHES:
        return True
    if op_name(node) == "_assert_tensor_metadata":  # `to` makes one of these for every tensor that it is given
        return True
    return op_name(node) == "flat_apply" and any("ModIndex" in str(a) for a in node.args)  # ``table[i]`` in a mod


def _function(node: Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""
