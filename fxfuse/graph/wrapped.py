"""Calls that only run a subgraph, under another grad or autocast mode.

`torch.export` puts what a model computes under `torch.no_grad()` into a submodule of its own, called by
`wrap_with_set_grad_enabled`. Tables computed there (transformers: cos and sin) are seen through and left as they came;
layers of the model that run there are inlined, for they hold operators to fuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

_LEADING = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""How many arguments stand before the submodule."""


@dataclass(frozen=True)
class Wrapped:
    """The subgraph of one call, and the call's arguments in the order of its placeholders."""

    module: GraphModule
    operands: Sequence[Any]

    @property
    def nodes(self) -> list[Node]:
        return list(self.module.graph.nodes)


def wrapped(node: Node) -> Wrapped | None:
    """The subgraph that this node runs; None where it runs none, or changes what the subgraph computes."""
    name = str(node.target) if isinstance(node.target, torch._ops.HigherOrderOperator) else ""
    if name not in _LEADING:
        return None
    leading = _LEADING[name]
    reference = _reference(node)
    if name == "wrap_with_autocast" and node.args[2]:
        return None  # it casts operands where the subgraph says nothing of it
    owner = node.graph.owning_module
    if owner is None or reference.op != "get_attr":
        return None
    module = owner.get_submodule(str(reference.target))
    return Wrapped(module, node.args[leading + 1 :]) if isinstance(module, GraphModule) else None


def flattened(nodes: Iterable[Node]) -> Iterator[Node]:
    """The nodes, each followed by those of the subgraph that it runs."""
    for node in nodes:
        yield node
        if (inside := wrapped(node)) is not None:
            yield from flattened(inside.nodes)


def inline_layers(program: ExportedProgram) -> None:
    """Inline, in place, every subgraph that reads parameters; what gradients did not flow out of is detached."""
    parameters = set(program.graph_signature.inputs_to_parameters)
    for node in list(program.graph.nodes):
        inside = wrapped(node)
        if inside is not None and any(isinstance(o, Node) and o.name in parameters for o in inside.operands):
            _inline(node, inside)
    program.graph_module.delete_all_unused_submodules()


def _inline(call: Node, inside: Wrapped) -> None:
    graph = call.graph
    *body, output = inside.nodes
    placeholders = [n for n in body if n.op == "placeholder"]
    env: dict[Node, Any] = dict(zip(placeholders, inside.operands, strict=True))
    without_grad = call.args[0] is False
    results = []
    with graph.inserting_before(call):
        for node in body:
            if node.op == "get_attr":
                env[node] = graph.get_attr(f"{_reference(call).target}.{node.target}")
                env[node].meta = dict(node.meta)
            elif node.op == "call_function":
                env[node] = graph.node_copy(node, env.__getitem__)
        returned: Any = output.args[0]
        for result in returned:
            value = env[result]
            if without_grad and isinstance(value, Node) and isinstance(value.meta.get("val"), torch.Tensor):
                detached = graph.call_function(torch.ops.aten.detach.default, (value,))
                detached.meta = {k: v for k, v in value.meta.items() if k != "tensor_meta"}
                value = detached
            results.append(value)
    for user in list(call.users):
        position: Any = user.args[1]
        user.replace_all_uses_with(results[position], propagate_meta=False)
        graph.erase_node(user)
    reference = _reference(call)
    graph.erase_node(call)
    if not reference.users:
        graph.erase_node(reference)


def _reference(call: Node) -> Node:
    reference = call.args[_LEADING[str(call.target)]]
    assert isinstance(reference, Node)
    return reference
