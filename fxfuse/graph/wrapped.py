"""Calls that only run a subgraph, under another grad or autocast mode: seen through, and left as they came.

`torch.export` puts what a model computes under `torch.no_grad()` (transformers: cos and sin) into a submodule of its
own, called by `wrap_with_set_grad_enabled`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
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
    reference = node.args[leading]
    if name == "wrap_with_autocast" and node.args[2]:
        return None  # it casts operands where the subgraph says nothing of it
    owner = node.graph.owning_module
    if owner is None or not isinstance(reference, Node) or reference.op != "get_attr":
        return None
    module = getattr(owner, str(reference.target), None)
    return Wrapped(module, node.args[leading + 1 :]) if isinstance(module, GraphModule) else None


def flattened(nodes: Iterable[Node]) -> Iterator[Node]:
    """The nodes, each followed by those of the subgraph that it runs."""
    for node in nodes:
        yield node
        if (inside := wrapped(node)) is not None:
            yield from flattened(inside.nodes)
