"""Blocks that run under another grad or autocast mode, inlined while regions are matched.

What autocast casts there is written down, and what gradients did not flow out of is detached. A block in which nothing
was fused is put back afterwards (`fxfuse.graph.blocks.put_back`).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from fxfuse.graph.blocks.autocast import Casts, casts_of
from fxfuse.graph.blocks.wrapped import Wrapped, block, flattened
from fxfuse.graph.marks import STANDS_FOR
from fxfuse.graph.program import name_outputs
from fxfuse.graph.view import DETACHED, LAYOUT, LOWERED, fake, op_name, tensor
from fxfuse.torch_seams import entered, fake_mode_of

Modes = dict[str, torch.dtype]
"""The devices on which autocast is on, and what it casts to."""


@dataclass(frozen=True)
class Saved:
    """What is needed to make a node again."""

    name: str
    target: Any
    meta: dict[str, Any]

    @staticmethod
    def of(node: Node) -> Saved:
        return Saved(node.name, node.target, node.meta)


@dataclass
class Inlined:
    """One block, and the nodes that stand for it."""

    call: Saved
    reference: Saved
    inside: Wrapped
    casts: dict[Node, Casts]
    """Of the subgraph's calls, what autocast casts."""
    ambient: bool
    """Does an autocast around it cast in it?"""
    copies: dict[Node, Node] = field(default_factory=dict)
    """By the nodes of the subgraph: the calls and constants that stand for them."""
    added: set[Node] = field(default_factory=set)
    """Casts and detached values."""
    taken: list[tuple[Saved, int]] = field(default_factory=list)
    """What took the block's results, and which."""
    results: list[Any] = field(default_factory=list)
    """What their readers read now."""
    nested: list[Inlined] = field(default_factory=list)
    operands: dict[Node, Any] = field(default_factory=dict)
    """By the placeholders of the subgraph: what is read for them now, once `put_back` has looked."""

    @property
    def given(self) -> list[tuple[Node, Any]]:
        """The placeholders of the subgraph, and what was read for them."""
        placeholders = (n for n in self.inside.nodes if n.op == "placeholder")
        return list(zip(placeholders, self.inside.operands, strict=True))

    @property
    def nodes(self) -> set[Node]:
        """Everything that stands for it, erased nodes too."""
        return {*self.copies.values(), *self.added}.union(*(n.nodes for n in self.nested))


@dataclass
class Blocks:
    """The blocks of one program."""

    outer: list[Inlined] = field(default_factory=list)
    left: list[tuple[str, Wrapped, Node]] = field(default_factory=list)
    """Blocks that stay, by name, each with the call in it of which it cannot be said what autocast does to it."""
    moved: dict[Node, Any] = field(default_factory=dict)
    """By the erased node that took a result: the result."""
    known: dict[Any, Casts | None] = field(default_factory=dict)

    def now(self, node: Any) -> Any:
        while isinstance(node, Node) and node in self.moved:
            node = self.moved[node]
        return node


def inline(program: ExportedProgram) -> Blocks:
    """Inline, in place, every block that can be written out."""
    found = Blocks()
    for call in list(program.graph.nodes):
        if (inside := block(call)) is not None:
            _try(found, call, inside, {}, found.outer)
    name_outputs(program)
    return found


def _try(found: Blocks, call: Node, inside: Wrapped, modes: Modes, into: list[Inlined]) -> None:
    """Inline the block, and then those that stand in it."""
    if not any(n.op == "call_function" for n in inside.nodes):
        return
    ambient = bool(modes)
    if inside.is_autocast:
        device, dtype, enabled, _ = inside.mode
        modes = {**{d: t for d, t in modes.items() if d != device}, **({device: dtype} if enabled else {})}
    casts = _casts(inside, modes, found.known)
    if isinstance(casts, Node):
        found.left.append((call.name, inside, casts))
        return
    if _enables_grad(inside) or any(user.target is not operator.getitem for user in call.users):
        return
    one = _inline(call, inside, casts, ambient, found.moved)
    for node in one.copies.values():
        value = tensor(node)
        if value is not None and value.dtype == modes.get(value.device.type) and op_name(node) not in LAYOUT:
            node.meta[LOWERED] = value.dtype
    into.append(one)
    for node in list(one.copies.values()):
        if (nested := block(node)) is not None:
            _try(found, node, nested, modes, one.nested)


def _casts(inside: Wrapped, modes: Modes, known: dict[Any, Casts | None]) -> dict[Node, Casts] | Node:
    """What autocast casts in a block and in those in it; the call of which it cannot be said, if there is one."""
    found: dict[Node, Casts] = {}
    for node in inside.nodes if modes else ():
        if node.op != "call_function":
            continue
        if (nested := block(node)) is not None:
            if not nested.is_autocast and isinstance(unclear := _casts(nested, modes, known), Node):
                return unclear
            if nested.is_autocast and nested.mode[0] not in modes:
                return node
        elif (casts := casts_of(node, modes, known)) is None:
            return node
        elif casts:
            found[node] = casts
    return found


def _enables_grad(inside: Wrapped) -> bool:
    """A block without gradients, in which another one has them: what comes out of that one is not detached."""
    return inside.mode[0] is False and any(
        found.mode[0] is True for n in flattened(inside.nodes) if (found := block(n)) is not None
    )


def _inline(call: Node, inside: Wrapped, casts: dict[Node, Casts], ambient: bool, moved: dict[Node, Any]) -> Inlined:
    graph = call.graph
    one = Inlined(Saved.of(call), Saved.of(inside.reference), inside, casts, ambient)
    *body, output = inside.nodes
    env: dict[Node, Any] = dict(zip((n for n in body if n.op == "placeholder"), inside.operands, strict=True))
    returned: Any = output.args[0]
    detached: dict[Node, Node] = {}
    with graph.inserting_before(call):
        for node in body:
            if node.op == "get_attr":
                env[node] = one.copies[node] = _constant(graph, inside.module, node)
            elif node.op == "call_function":
                env[node] = one.copies[node] = graph.node_copy(node, env.__getitem__)
                one.added.update(_cast(graph, node, one.copies[node], casts.get(node, {}), env))
        for result in returned:
            value = env[result] if isinstance(result, Node) else result
            if inside.mode[0] is False and isinstance(value, Node) and _may_have_gradient(value):
                if value not in detached:
                    detached[value] = _detached(graph, value)
                value = detached[value]
            one.results.append(value)
    one.added.update(detached.values())
    for user in list(call.users):
        position: Any = user.args[1]
        one.taken.append((Saved.of(user), position))
        value = moved[user] = one.results[position]
        user.replace_all_uses_with(value, propagate_meta=False)
        if value in one.added or value in one.copies.values():
            value.meta.setdefault(STANDS_FOR, (value.name, user.meta.get(STANDS_FOR, (user.name, user.name))[1]))
        graph.erase_node(user)
    graph.erase_node(call)
    if not inside.reference.users:
        graph.erase_node(inside.reference)
    return one


def _constant(graph: Graph, module: GraphModule, node: Node) -> Node:
    """What a subgraph refers to, under a name of its own in the whole graph's module."""
    owner = graph.owning_module
    assert owner is not None
    base = name = str(node.target).replace(".", "_")
    count = 0
    while hasattr(owner, name):
        name, count = f"{base}_{count}", count + 1
    setattr(owner, name, operator.attrgetter(str(node.target))(module))
    copied = graph.get_attr(name)
    copied.meta = dict(node.meta)
    return copied


def _cast(graph: Graph, node: Node, copied: Node, casts: Casts, env: dict[Node, Any]) -> list[Node]:
    """The casts that autocast would make of what the copy of a call reads."""
    added = []
    for place, source in enumerate(node.all_input_nodes):
        if place not in casts:
            continue
        value, dtype = env[source], casts[place]
        with graph.inserting_before(copied):
            cast = graph.call_function(torch.ops.aten.to.dtype, (value, dtype))
        cast.meta = {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta")}
        before = fake(source)
        with entered(fake_mode_of(before)), torch.no_grad():
            cast.meta["val"] = before.to(dtype)
        copied.replace_input_with(value, cast)
        added.append(cast)
    return added


def _may_have_gradient(node: Node) -> bool:
    value = tensor(node)
    return value is not None and (value.dtype.is_floating_point or value.dtype.is_complex)


def _detached(graph: Graph, value: Node) -> Node:
    detached = graph.call_function(torch.ops.aten.detach.default, (value,))
    detached.meta = {k: v for k, v in value.meta.items() if k != "tensor_meta"}
    detached.meta[DETACHED] = True
    return detached
