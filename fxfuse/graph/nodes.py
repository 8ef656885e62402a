"""What one node is: its operator by name, its fake tensor, an argument; is it pure, random, a size?"""

from __future__ import annotations

import operator
from functools import lru_cache
from typing import Any

import torch
from torch.fx import Node

from fxfuse.graph.higher_order import higher_order
from fxfuse.graph.vocabulary import NO_OP
from fxfuse.torch_seams import schema_of


def op_name(node: Node) -> str:
    """``"mul"`` for `aten.mul.Tensor`, ``"getitem"`` for `operator.getitem`, ``""`` for what is not a call."""
    if node.op != "call_function":
        return ""
    target = node.target
    known = _names.get(id(target))
    if known is None:
        if target is operator.getitem:
            name = "getitem"
        else:
            schema = schema_of(target)
            name = str(schema.name.split("::")[1]) if schema is not None else str(target)
        known = _names[id(target)] = (target, name)  # kept, so that no other target gets its id
    return known[1]


_names: dict[int, tuple[Any, str]] = {}
"""The name of every target that was met, by the target's id: hashing an operator costs as much as reading its name."""


def tensor(node: Node) -> torch.Tensor | None:
    """The node's fake tensor, or None for sizes, lists and assertions."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def fake(node: Node) -> torch.Tensor:
    """The node's fake tensor, for nodes known to have one."""
    value = tensor(node)
    assert value is not None, f"{node.name} is not a tensor"
    return value


def is_size(node: Node) -> bool:
    """Is it a number, and no tensor?"""
    return isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def is_float(node: Node) -> bool:
    value = tensor(node)
    return value is not None and value.dtype.is_floating_point


def size_text(size: Any) -> str:
    """A size as text; printing a symbolic expression is slow, and the same few are printed over and over."""
    return _text(size.node.expr) if isinstance(size, torch.SymInt) else str(size)


@lru_cache(maxsize=4096)
def _text(expr: Any) -> str:
    return str(expr)


def static(dim: Any) -> int | None:
    """The size if it is a plain int (never guards on a symbol)."""
    return dim if isinstance(dim, int) else None


def is_pure(node: Node) -> bool:
    """Computes a value from its inputs and does nothing else."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem or higher_order(node) is not None:
        return True
    schema = schema_of(node.target)
    if schema is None or schema.is_mutable:
        return False
    return not is_random(node)


def is_random(node: Node) -> bool:
    """Draws random numbers: active dropout and its like."""
    tags = getattr(node.target, "tags", ())
    name = op_name(node)
    if name in NO_OP:
        p, train = [*node.args, True, True][1:3]
        return bool(train) and not (isinstance(p, (int, float)) and p == 0)
    if name == "scaled_dot_product_attention":
        p = argument(node, "dropout_p")
        return not (isinstance(p, (int, float)) and p == 0)
    return torch.Tag.nondeterministic_seeded in tags


def argument(node: Node, name: str) -> Any:
    """The value of a schema argument, given by position, by keyword or by default."""
    for position, arg in enumerate(schema_of(node.target).arguments):
        if arg.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            if not arg.kwarg_only and position < len(node.args):
                return node.args[position]
            return arg.default_value if arg.has_default_value() else None
    return None
