"""Calls that only run a subgraph, under another grad or autocast mode.

`torch.export` puts what a model computes under `torch.no_grad()` or `torch.autocast()` into a submodule of its own,
called by `wrap_with_set_grad_enabled` or `wrap_with_autocast`. While regions are matched they are inlined
(`fxfuse.graph.blocks.inline`); here is how they are read where they stand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from fxfuse.torch_seams import HigherOrderOperator

_LEADING = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""How many arguments stand before the submodule."""


@dataclass(frozen=True)
class Wrapped:
    """The subgraph of one call, and the call's arguments in the order of its placeholders."""

    module: GraphModule
    operands: Sequence[Any]
    mode: tuple[Any, ...]
    """``(enabled,)`` of grad mode; ``(device, dtype, enabled, cache_enabled)`` of autocast."""
    reference: Node
    """The `get_attr` of the submodule."""

    @property
    def nodes(self) -> list[Node]:
        return list(self.module.graph.nodes)

    @property
    def is_autocast(self) -> bool:
        return len(self.mode) > 1

    @property
    def casts(self) -> bool:
        """May it cast operands where the subgraph says nothing of it?"""
        return self.is_autocast and bool(self.mode[2])


def block(node: Node) -> Wrapped | None:
    """The subgraph that this node runs under a mode of its own; None where it runs none."""
    name = str(node.target) if isinstance(node.target, HigherOrderOperator) else ""
    if name not in _LEADING:
        return None
    leading = _LEADING[name]
    reference, owner = node.args[leading], node.graph.owning_module
    if owner is None or not isinstance(reference, Node) or reference.op != "get_attr":
        return None
    module = owner.get_submodule(str(reference.target))
    if not isinstance(module, GraphModule):
        return None
    return Wrapped(module, node.args[leading + 1 :], tuple(node.args[:leading]), reference)


def wrapped(node: Node) -> Wrapped | None:
    """The subgraph that this node runs; None where it runs none, or changes what the subgraph computes."""
    found = block(node)
    return None if found is None or found.casts else found


def flattened(nodes: Iterable[Node]) -> Iterator[Node]:
    """The nodes, each followed by those of the subgraph that it runs."""
    for node in nodes:
        yield node
        if (inside := block(node)) is not None:
            yield from flattened(inside.nodes)
