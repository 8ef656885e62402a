"""Collects what a value is computed from, writes in place included: for m after ``m = zeros(S, S); m[:, :4] = 1``.

An export graph has one name for a tensor, whatever is written to it later. So what a reader finds under that name
depends on whether it reads before a write or after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch.fx import Node

from fxfuse.graph.blocks.wrapped import block
from fxfuse.graph.view import ALIASES, ASSERTIONS, bases, is_size, mutated, op_name, storage_roots


class Unclear(Exception):
    """It cannot be told what a tensor holds where it is read."""


def with_writes(wanted: Iterable[Node], limit: int) -> list[Node]:
    """All nodes that these tensors are computed from, as their readers find them, in graph order.

    Raises:
        Unclear: there are more than `limit` of them; a tensor is read both before a write and after it; or a write is
            to what may be a view or a copy.
    """
    asked = list(dict.fromkeys(wanted))
    included: dict[Node, None] = {}
    while True:
        found = ancestors([*asked, *included], limit)
        fresh = [
            (writer, clear)
            for writer, clear in _writers(found).items()
            if writer not in included and _counts(writer, asked, included)
        ]
        if not fresh:
            return sorted(found)
        for writer, clear in fresh:
            if not clear:
                raise Unclear(f"{writer.name} writes to what may be a copy")
            included[writer] = None


def ancestors(nodes: Iterable[Node], limit: int) -> list[Node]:
    """All nodes that these tensors are computed from by their arguments alone, inputs first. Writes are left out, and
    so is what computes sizes.

    Raises:
        Unclear: there are more than `limit` of them.
    """
    seen: set[Node] = set()
    order: list[Node] = []
    stack: list[tuple[Node, bool]] = [(n, False) for n in nodes]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
            continue
        if node in seen:
            continue
        seen.add(node)
        if len(seen) > limit:
            raise Unclear("too much of the program would have to be computed")
        stack.append((node, True))
        stack.extend((i, False) for i in node.all_input_nodes if not is_size(i))
    return order


def shares_storage(node: Node) -> bool:
    """Does the node's result for certain share its memory with its first argument? It is a view then, or a write."""
    return bool(bases(node)) and block(node) is None and op_name(node) not in ALIASES - {"getitem"}


def _writers(nodes: Iterable[Node]) -> dict[Node, bool]:
    """By node that writes to one of these tensors or to a view of one: True if that is certain, False if what it writes
    to may as well be a copy."""
    found: dict[Node, bool] = {}
    clear: dict[Node, bool] = {}
    stack = [(node, True) for node in nodes]
    while stack:
        node, certain = stack.pop()
        if node in clear and (certain or not clear[node]):
            continue
        clear[node] = certain
        for user in node.users:
            if node in mutated(user):
                found[user] = found.get(user, True) and certain
            if node in bases(user):
                stack.append((user, certain and shares_storage(user)))
    return found


def _counts(writer: Node, asked: list[Node], included: Iterable[Node]) -> bool:
    """Do the tensors that are asked for, as their readers find them, hold what `writer` writes?

    Raises:
        Unclear: some do, and others do not.
    """
    touched = mutated(writer)
    verdicts = {_is_read_after(node, writer) for node in asked if node < writer and storage_roots(node) & touched}
    if any(writer < node for node in [*asked, *included]):
        verdicts.add(True)
    if len(verdicts) > 1:
        raise Unclear(f"{writer.name} writes to what is read before and after")
    return True in verdicts


def _is_read_after(node: Node, writer: Node) -> bool:
    """Is the tensor read after the write, and not before it? False if it is never read.

    Raises:
        Unclear: it is read before and after.
    """
    after = {reader > writer for reader in _readers(node) if reader is not writer}
    if len(after) > 1:
        raise Unclear(f"{node.name} is read before {writer.name} writes to it, and after")
    return True in after


def _readers(node: Node) -> Iterator[Node]:
    """The nodes that read the elements of a tensor, or of a view of it."""
    seen: set[Node] = set()
    stack = [node]
    while stack:
        here = stack.pop()
        if here in seen:
            continue
        seen.add(here)
        for user in here.users:
            if op_name(user) in ASSERTIONS or is_size(user):
                continue
            view = here in bases(user)
            if view:
                stack.append(user)
            if not (view and shares_storage(user)):
                yield user
