"""A call without the names of its nodes: its operator, what it reads, and everything else that it is given.

Arguments come in the order of the operator's schema, those that were left out at their defaults, so that one call has
one spelling however it was written down.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from operator import attrgetter
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxfuse.torch_seams import HigherOrderOperator, OpOverload, overload_name, schema_of

Spelled = tuple[Hashable, list[Node]]
"""What is literal, with a mark wherever a node is read; and these nodes in order."""
_NODE = ("node",)


def call(node: Node) -> Spelled:
    """The spelling of a call."""
    read: list[Node] = []
    parts = tuple((name, _literal(value, kind, read)) for name, value, kind in arguments(node))
    return (target_name(node.target), parts), read


def structure(value: Any) -> Spelled:
    """The spelling of nested lists of nodes: what a graph gives."""
    read: list[Node] = []
    return _literal(value, "", read), read


def arguments(node: Node) -> list[tuple[str, Any, str]]:
    """The arguments of a call: the name, the value and the type that the schema has for it."""
    schema = schema_of(node.target)
    if schema is None:
        named = [(str(i), value, "") for i, value in enumerate(node.args)]
        return named + [(name, value, "") for name, value in sorted(node.kwargs.items())]
    found = []
    names = [argument.name for argument in schema.arguments]
    extra = [(str(i), value, "") for i, value in enumerate(node.args) if i >= len(names)]
    extra += [(name, value, "") for name, value in sorted(node.kwargs.items()) if name not in names]
    for position, argument in enumerate(schema.arguments):
        if argument.name in node.kwargs:
            value = node.kwargs[argument.name]
        elif position < len(node.args) and not argument.kwarg_only:
            value = node.args[position]
        else:
            value = argument.default_value if argument.has_default_value() else None
        found.append((argument.name, value, str(argument.type)))
    return found + extra


def target_name(target: Any) -> str:
    """What is called, by a name that is the same in another process."""
    if isinstance(target, OpOverload):
        return f"{schema_of(target).name}.{overload_name(target)}"
    if isinstance(target, HigherOrderOperator):
        return f"higher_order.{target}"
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', repr(target))}"


def content(reference: Node) -> Hashable:
    """What a `get_attr` node refers to: a constant bit by bit, a subgraph call by call."""
    return _held(attrgetter(str(reference.target))(reference.graph.owning_module))


def bits(value: torch.Tensor) -> Hashable:
    """Dtype, shape and every bit of a tensor; of one without data (meta) there are none."""
    if not is_plain(value):
        return ("unknown", id(value))  # equal to itself
    held = b""
    if not value.is_meta and value.numel():
        plain = value.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
        held = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    kind = "meta" if value.is_meta else "data"
    return ("tensor", kind, str(value.dtype), tuple(value.shape), hashlib.sha256(held).hexdigest())


def is_plain(value: torch.Tensor) -> bool:
    """Is it a tensor whose bits are all that it is: not sparse, and of no class of its own?"""
    return value.layout == torch.strided and type(value) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def subgraphs(node: Node) -> list[GraphModule]:
    """The subgraphs that a call is given."""
    owner = node.graph.owning_module
    found = [attrgetter(str(n.target))(owner) for n in node.all_input_nodes if n.op == "get_attr"]
    return [module for module in found if isinstance(module, GraphModule)]


def _held(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return bits(value)
    if isinstance(value, GraphModule):
        return _graph(value)
    if isinstance(value, (bool, int, float, str, type(None))):
        return (type(value).__name__, repr(value))
    return ("unknown", type(value).__name__, repr(value))


def _graph(module: GraphModule) -> Hashable:
    """The calls of a subgraph, what they read by the position of the node that computes it."""
    places: dict[Node, int] = {}
    lines: list[Hashable] = []
    for node in module.graph.nodes:
        if node.op == "call_function":
            head, read = call(node)
        elif node.op == "output":
            head, read = structure(node.args[0])
        elif node.op == "get_attr":
            head, read = content(node), []
        else:
            head, read = node.op, []
        lines.append((node.op, head, tuple(places[n] for n in read)))
        places[node] = len(places)
    return ("graph", tuple(lines))


def _literal(value: Any, kind: str, read: list[Node]) -> Hashable:
    if isinstance(value, Node):
        read.append(value)
        return _NODE
    if isinstance(value, (list, tuple)):
        return ("list", tuple(_literal(v, kind, read) for v in value))
    if isinstance(value, dict):
        return ("dict", tuple((repr(k), _literal(v, "", read)) for k, v in value.items()))
    if isinstance(value, slice):
        return ("slice", tuple(_literal(v, "", read) for v in (value.start, value.stop, value.step)))
    if isinstance(value, (bool, int, float)):
        # `is_causal=True` is 1 where the schema says int, and a scale of 1 is 1.0 where it says float.
        if "float" in kind:
            value = float(value)
        elif "int" in kind or "SymInt" in kind:
            value = int(value) if isinstance(value, bool) else value
        return (type(value).__name__, repr(value))
    return (type(value).__name__, repr(value))
