"""What is left beside an attention that was found: repeated heads, weights that others read. The report says why."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch.fx import Node

from fxfuse.graph.region import Region, real_users
from fxfuse.graph.source import source_line
from fxfuse.graph.view import LAYOUT, fake, op_name, static, tensor
from fxfuse.patterns.attention.parts import SDPA, Parts
from fxfuse.recognise.walk import chain_back

_REPEATS = frozenset(["expand", "repeat", "repeat_interleave", "tile", "expand_as", "broadcast_to", "index_select"])


def left_beside(region: Region, parts: Parts) -> Iterator[str]:
    """Sentences for the report; none where everything went into the operator."""
    if len(region.sources) >= 3:
        yield from _repeated(region)
    if op_name(parts.softmax) == SDPA:
        return
    readers = [u for u in real_users(parts.softmax) if u not in region.nodes and op_name(u) != "sym_size"]
    if readers:
        yield (
            f"its weights are read by others ({_place(readers[0])}), so scores and softmax are computed beside it too: "
            "need_weights=False, or whatever drops them, spares that"
        )


def _repeated(region: Region) -> Iterator[str]:
    found = [_repeat(region, source) for source in region.sources[1:3]]
    times = [1 if repeat is None else _times(repeat) for repeat in found]
    if times[0] != times[1]:
        why = f"k {times[0]} times and v {times[1]} times, and Attention has one number of heads for both"
    else:
        why = "Attention shares a KV head among neighbouring query heads, whose keys and values are only moved then"
    for what, repeat in zip(("k", "v"), found, strict=True):
        if repeat is not None:
            yield f"{what} stays with its heads repeated before it ({_place(repeat)}): {why}"


def _place(node: Node) -> str:
    return ", ".join(filter(None, (node.name, source_line(node))))


def _repeat(region: Region, source: Node) -> Node | None:
    """The node behind k or v, through what moves elements alone, that has more elements than what it is made of."""
    for node in chain_back(region.view, source, lambda name: name in LAYOUT or name in _REPEATS):
        if op_name(node) in _REPEATS and _times(node) > 1:
            return node
    return None


def _times(repeat: Node) -> int:
    """How often it has what it is made of, by the sizes that are numbers; 1 where the others changed in number."""
    before = next((i for i in repeat.all_input_nodes if tensor(i) is not None), None)
    if before is None:
        return 1
    fixed = [[n for s in fake(i).shape if (n := static(s)) is not None] for i in (before, repeat)]
    free = [fake(i).dim() - len(f) for i, f in zip((before, repeat), fixed, strict=True)]
    small, large = (math.prod(f) for f in fixed)
    return large // small if free[0] == free[1] and small else 1
