"""Integers that are kept several to a word (two of four bits in a byte, eight in an int32): where they are unpacked.

The result of such a region is not proportional to the words, but to the integers that are unpacked from them. So the
region is split at the node that holds the integers: everything goes through it, and no operator on bits comes after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxfuse.graph.region import Region
from fxfuse.graph.view import ARITHMETIC, fake, is_float, op_name, tensor
from fxfuse.proof.positions.whole import bounds

BITS = frozenset(
    [
        "__and__",
        "__or__",
        "__xor__",
        "__rshift__",
        "__lshift__",
        "bitwise_and",
        "bitwise_or",
        "bitwise_xor",
        "bitwise_right_shift",
        "bitwise_left_shift",
    ]
)
_HELD = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


@dataclass(frozen=True)
class Unpacked:
    """A region in two parts: from the words to the integers, and from the integers to the result."""

    integers: Node
    """The node of the integers; the region's first source itself if nothing is packed."""
    before: tuple[Node, ...]
    """The nodes that unpack the words, in order; the last one is the integers."""
    after: Region
    """The region from the integers to the result."""
    places: tuple[int, ...]
    """For each of `after.others` its place among the whole region's others."""

    def __call__(self, region: Region, x: Tensor, others: Sequence[Tensor]) -> Tensor:
        """The integers of these words."""
        env = dict(zip((region.sources[0], *region.others), (x, *others), strict=True))
        for node in self.before:
            args: Any = map_arg(tuple(node.args), env.__getitem__)
            kwargs: Any = map_arg(dict(node.kwargs), env.__getitem__)
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return env[self.integers]


def is_packed(region: Region) -> bool:
    return any(op_name(node) in BITS for node in region.nodes)


def unpacked(region: Region) -> Unpacked | None:
    """Where the integers of a region stand; None where there is no such node."""
    leaf = region.sources[0]
    cut = leaf if not is_packed(region) else _cut(region)
    if cut is None:
        return None
    before = _needed(region, [cut])
    after = [n for n in region.nodes if n not in before]
    read = {i for n in after for i in n.all_input_nodes}
    if any(n in read for n in before if n is not cut):
        return None
    others = [n for n in region.others if n in read]
    part = Region(
        region.view,
        region.output,
        (cut, *region.sources[1:]),
        tuple(others),
        tuple(after),
        integers_below=region.integers_below,
    )
    inside = tuple(n for n in region.nodes if n in before)
    return Unpacked(cut, inside, part, tuple(region.others.index(n) for n in others))


def tables(region: Region) -> set[Node]:
    """Tensors with which words are unpacked (shifts, masks). They keep the values that the program holds."""
    found = unpacked(region)
    if found is None:
        return set()
    return {n for n in region.others if any(n in m.all_input_nodes for m in found.before)}


def chosen_by(region: Region) -> set[Node]:
    """Integer inputs that say which row of another tensor is read, such as GPTQ's `g_idx`."""
    inside, found = set(region.nodes), set[Node]()
    stack = [i for n in region.nodes if op_name(n) == "index" for i in n.all_input_nodes if i is not n.args[0]]
    while stack:
        node = stack.pop()
        if node in inside:
            stack.extend(node.all_input_nodes)
        elif node in region.others and not is_float(node):
            found.add(node)
    return found


def types_of(integers: Node) -> list[torch.dtype]:
    """Types that hold all of the integers, whatever the words are; those of a byte come before wider ones."""
    kind, held = fake(integers).dtype, bounds(integers)
    if kind in _HELD:
        return [kind]
    bytes_ = [k for k, (low, high) in _HELD.items() if held is not None and low <= held[0] and held[1] <= high]
    return bytes_ + [kind] * (kind == torch.int16)


def _cut(region: Region) -> Node | None:
    """The node at which to split: the last node of integers that everything from the words goes through, after the last
    operator on bits, and before other tensors (zero points) are subtracted."""
    last = max(place for place, node in enumerate(region.nodes) if op_name(node) in BITS)
    found = None
    for node in region.nodes[last:]:
        several = sum(tensor(i) is not None for i in node.all_input_nodes) > 1
        if is_float(node) or (several and op_name(node) in ARITHMETIC):
            break
        if not _reaches(region, node) and types_of(node):
            found = node
    return found


def _reaches(region: Region, without: Node) -> bool:
    """Is there a path from the words to the result that does not go through this node?"""
    return region.sources[0] in _needed(region, [region.output], without)


def _needed(region: Region, nodes: Iterable[Node], without: Node | None = None) -> set[Node]:
    """The nodes that these are computed from, themselves included."""
    inside, found, stack = set(region.nodes), set[Node](), list(nodes)
    while stack:
        node = stack.pop()
        if node in found or node is without:
            continue
        found.add(node)
        if node in inside:
            stack.extend(node.all_input_nodes)
    return found
