"""A region: one output, a few inputs, and the nodes between. What is proposed, asked, proven and replaced."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxfuse.graph.view import (
    ASSERTIONS,
    BLANK,
    DETACHED,
    LAYOUT,
    UNSET,
    GraphView,
    is_pure,
    is_size,
    op_name,
    size_text,
    tensor,
)


@dataclass(frozen=True)
class Region:
    """The nodes that turn `sources` (and `others`, which do not depend on them) into `output`."""

    view: GraphView
    output: Node
    sources: tuple[Node, ...]
    """The inputs the operator is a function of: x; or q, k, v."""
    others: tuple[Node, ...]
    """Tensors the region also reads, computed without the sources: weights, cos and sin, masks."""
    nodes: tuple[Node, ...]
    """In graph order; the output is last."""
    equal_sizes: tuple[tuple[Any, Any], ...] = ()
    """Pairs of sizes that torch.export keeps apart and the region needs equal: the first of a pair is taken to be the
    second wherever the region is evaluated, for it cannot run otherwise."""
    source_limits: tuple[int, ...] = ()
    """By axis, how large a source has to be at most to ask what the region computes, which treats the positions beyond
    alike. Empty where nothing is to be cut off."""
    integers_below: int | Callable[[Any], int] = 4
    """Integer inputs are drawn below this number, or below what this function gives for some `Sizes`: they index
    something that has so many rows."""
    hidden_table_rows: int | None = None
    """The fewest rows of a table that is indexed within a subgraph that the region calls, if one is."""
    telling_sizes: tuple[tuple[Any, int], ...] = ()
    """Symbols, each with a size at which every number that the region mentions (a window's, a prefix's) shows in the
    result."""
    ascending: frozenset[Node] = frozenset()
    """Inputs whose rows ascend: the region searches them, which means nothing otherwise."""
    more_outputs: tuple[Node, ...] = ()
    """Values that are computed on the way to `output` and that are read outside too: the replacement gives them as
    well, after the output, in this order."""
    small: Region | None = None
    """A copy of the region at smaller sizes that computes alike. The copy is asked and proven in its place."""
    words: bool = False
    """Are the integers of the first source words that each hold several numbers? They are then drawn with all bits."""
    narrowed: bool = False
    """Of a copy at smaller sizes: does it rely on what inputs of the large region hold in this program?"""

    @property
    def asked(self) -> Region:
        """The region that is asked and proven: the smaller copy, where there is one."""
        return self if self.small is None else self.small

    @property
    def outputs(self) -> tuple[Node, ...]:
        return (self.output, *self.more_outputs)

    @property
    def inputs(self) -> tuple[Node, ...]:
        return self.sources + self.others

    @cached_property
    def key(self) -> str:
        """Equal keys: the same calls on inputs of the same shapes and dtypes. One answer serves them all."""
        ids: dict[Node, str] = {}
        parts = []
        for i, node in enumerate(self.inputs):
            ids[node] = f"%{i}"
            value = tensor(node)
            assert value is not None
            parts.append(f"{value.dtype}{self.view.shape(node)}")
        parts.append(f"{len(self.sources)},{[self.nodes.index(n) for n in self.more_outputs]}")

        def spell(arg: Any) -> str:
            if isinstance(arg, Node) and arg.op == "get_attr":
                return spelled_out(arg)
            if isinstance(arg, Node):
                canonical = self.view.canonical(arg)
                return ids.get(arg) or ids.get(canonical) or size_text(arg.meta.get("val"))
            if isinstance(arg, (list, tuple)):
                return "[" + ",".join(map(spell, arg)) + "]"
            return repr(arg)

        for node in self.nodes:
            kwargs = ",".join(f"{k}={spell(v)}" for k, v in node.kwargs.items())
            parts.append(f"{node.target}({spell(node.args)},{kwargs})")
            ids[node] = f"%{len(ids)}"
        return ";".join(parts)

    @cached_property
    def computed(self) -> frozenset[Node]:
        """The nodes but for what other regions may share: sources moved about (a transpose, a repeat of heads), and
        the positions at which something is read or written."""
        moved = set(self.sources)
        for node in self.nodes[:-1]:
            only_moved = op_name(node) in LAYOUT and all(i in moved or tensor(i) is None for i in node.all_input_nodes)
            if only_moved or _is_position(node):
                moved.add(node)
        return frozenset(n for n in self.nodes if n not in moved)

    @cached_property
    def closed(self) -> bool:
        """Does nothing outside read a value computed inside, but for the outputs? Then the whole computation goes."""
        inside = set(self.nodes)
        return all(u in inside for n in self.computed if n not in self.outputs for u in real_users(n))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(n.name for n in self.nodes)


def between(
    view: GraphView,
    output: Node,
    sources: Sequence[Node],
    allowed: Callable[[str], bool],
    limit: int = 80,
    given: Iterable[Node] = (),
    shared: Collection[Node] = (),
) -> Region | None:
    """The region from `sources` to `output`, or None.

    Args:
        given: is read as it is, though it may be computed from a source too (a mask made of v).
        shared: is read too, and what is computed of it lies within the region: of ``keep`` and ``~keep``, ``keep``.

    None where a node on the way is not `allowed`, is random, writes in place or ends a block without gradients, where
    the region has more than `limit` nodes, or where a source does not reach the output or is no tensor (what `split`
    gives, whole).
    """
    if tensor(output) is None or output in sources or any(tensor(s) is None for s in sources):
        return None
    first = min(view.order[s] for s in (*sources, *shared))
    depends = dict.fromkeys(given, False) | dict.fromkeys(shared, True) | dict.fromkeys(sources, True)
    others: dict[Node, None] = {}
    budget = limit * 8

    stack = [output]
    while stack:
        node = stack[-1]
        if node in depends:
            stack.pop()
            continue
        unset = node.op == "call_function" and op_name(node) in UNSET
        if (view.order[node] < first and not unset) or node.op != "call_function" or is_size(node):
            depends[node] = False
            stack.pop()
            continue
        pending = [i for i in node.all_input_nodes if i not in depends]
        if pending:
            budget -= len(pending)
            if budget < 0:
                return None
            stack.extend(pending)
            continue
        depends[node] = unset or any(depends[i] for i in node.all_input_nodes)
        stack.pop()
    if not depends[output]:
        return None

    nodes: set[Node] = set()
    reached: set[Node] = set()
    walk = [output]
    while walk:
        node = walk.pop()
        if node in nodes:
            continue
        if not (allowed(op_name(node)) or op_name(node) in BLANK) or not is_pure(node) or DETACHED in node.meta:
            return None
        nodes.add(node)
        if len(nodes) > limit:
            return None
        for i in node.all_input_nodes:
            if i in sources:
                reached.add(i)
            elif i in shared:
                others.setdefault(view.canonical(i))
            elif depends[i]:
                walk.append(i)
            elif tensor(i) is not None:
                others.setdefault(view.canonical(i))
            elif isinstance(i.meta.get("val"), (list, tuple)) or i.op == "get_attr":
                return None
    if len(reached) < len(set(sources)):
        return None
    ordered = view.sorted(nodes)
    start = min(view.order[n] for n in ordered)
    if view.mutations and view.mutated_between([*sources, *others, *ordered], start, view.order[output]):
        return None
    return Region(view, output, tuple(sources), tuple(view.sorted(others)), tuple(ordered))


def real_users(node: Node) -> list[Node]:
    """The users of a node that need its value: assertions on its metadata do not."""
    return [u for u in node.users if op_name(u) not in ASSERTIONS]


def too_early(region: Region) -> list[Node]:
    """What reads outputs of the region, at first or second hand, and stands before the last of them."""
    if not region.more_outputs:
        return []
    inside, late = set(region.nodes), set(region.more_outputs)
    found = []
    node = region.nodes[0]
    while node is not region.output:
        node = node.next
        if node not in inside and op_name(node) not in ASSERTIONS and any(i in late for i in node.all_input_nodes):
            late.add(node)
            found.append(node)
    return found


def _is_position(node: Node) -> bool:
    value = tensor(node)
    return value is not None and value.dtype in (torch.int32, torch.int64)


def spelled_out(reference: Node) -> str:
    """What a node refers to: a subgraph's calls and constants, or the name of what is not one."""
    owner = reference.graph.owning_module
    found = operator.attrgetter(str(reference.target))(owner)
    if not isinstance(found, GraphModule):
        return repr(found.tolist()) if isinstance(found, torch.Tensor) and found.numel() < 64 else str(reference.target)
    parts = []
    for node in found.graph.nodes:
        parts.append(spelled_out(node) if node.op == "get_attr" else f"{node.target}{node.args}{dict(node.kwargs)}")
    return "{" + ";".join(parts) + "}"
