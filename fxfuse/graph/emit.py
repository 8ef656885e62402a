"""Calls put into a graph one behind the other, each with the value that it computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from fxfuse.torch_seams import entered, sizes_of_one, unguarded

KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "custom")
"""The metadata that says where in the model a node comes from."""


class Emitter:
    """Puts calls into the graph, and notes that they come from where `like` does.

    Args:
        like: they stand right behind it, or behind all inputs, if it is one.
        before: they stand right before this node instead.
    """

    def __init__(self, like: Node, before: Node | None = None) -> None:
        self.graph = like.graph
        self.added: list[Node] = []
        self._meta = {k: like.meta[k] for k in KEPT_META if k in like.meta}
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"] if like.op == "placeholder" else [like]
        self._point = before.prev if before is not None else inputs[-1]

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """The node of ``target(*args, **kwargs)``; nodes among the arguments stand before."""
        with self.graph.inserting_after(self._point):
            node = self.graph.call_function(target, args, kwargs)
        self.added.append(node)
        self._point = node
        node.meta = {**self._meta, "val": value_of(node)}
        return node


def value_of(node: Node, instead: Mapping[Node, Any] | None = None) -> Any:
    """The fake value of a call, from those of its arguments.

    Args:
        instead: values to take for those that nodes have.

    Raises:
        Exception: whatever the operator raises; and where a symbolic size would be guarded on.
    """

    def value(of: Node) -> Any:
        return instead[of] if instead and of in instead else of.meta["val"]

    given = [value(n) for n in node.all_input_nodes]
    several = [t for v in given for t in (v if isinstance(v, (list, tuple)) else (v,))]
    mode = next((t.fake_mode for t in several if hasattr(t, "fake_mode")), None)
    args, kwargs = map_arg((node.args, node.kwargs), value)
    with sizes_of_one(), entered(mode), torch.no_grad(), unguarded(mode):
        return node.target(*args, **kwargs)  # type: ignore[operator]
