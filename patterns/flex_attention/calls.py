"""A call of flex_attention in an export graph, its arguments by name.

https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.fx import GraphModule, Node

OUTPUTS = ("output", "logsumexp", "max_scores")
"""What the call gives, by position; the last two in units of log 2."""
_ARGUMENTS = (
    "query",
    "key",
    "value",
    "score_mod",
    "block_mask",
    "scale",
    "kernel_options",
    "score_mod_other_buffers",
    "mask_mod_other_buffers",
)


@dataclass(frozen=True)
class Flex:
    """One call of the higher-order operator.

    query [B, Hq, S, D], key [B or 1, Hkv, T, D], value [B or 1, Hkv, T, Dv]; Hkv divides Hq. `score_mod` maps
    (score, b, h, q, kv, *score_buffers) to a score, `mask_mod` maps (b, h, q, kv, *mask_buffers) to whether the key is
    kept; both are written for scalars.
    """

    node: Node
    query: Node
    key: Node
    value: Node
    score_mod: GraphModule
    block_mask: Mapping[str, Any]
    """The block mask but for its function, by the names of `BlockMask`'s attributes (``kv_num_blocks``, …); of pairs
    (``seq_lengths``, ``BLOCK_SIZE``) each half, ``.0`` and ``.1``."""
    mask_mod: GraphModule
    scale: float
    kernel_options: Mapping[str, Any]
    score_buffers: tuple[Any, ...]
    """Nodes of captured tensors and sizes, or numbers."""
    mask_buffers: tuple[Any, ...]

    @property
    def used(self) -> dict[str, Node]:
        """The outputs that are read, by name, with the node that takes each."""
        return {
            OUTPUTS[int(n.args[1])]: n  # type: ignore[arg-type]
            for n in self.node.users
            if n.target is operator.getitem and n.users
        }


def flex(node: Node) -> Flex | None:
    """The call that this node is, or None."""
    if node.op != "call_function" or node.target is not torch.ops.higher_order.flex_attention:
        return None
    given: dict[str, Any] = dict(zip(_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
    *lists, mask_mod = given["block_mask"]
    score, mask = _module(node, given["score_mod"]), _module(node, mask_mod)
    names = block_mask_names()
    if score is None or mask is None or len(names) != len(lists):
        return None
    return Flex(
        node,
        given["query"],
        given["key"],
        given["value"],
        score,
        dict(zip(names, lists, strict=True)),
        mask,
        given["scale"],
        given.get("kernel_options") or {},
        tuple(given.get("score_mod_other_buffers", ())),
        tuple(given.get("mask_mod_other_buffers", ())),
    )


@lru_cache(maxsize=1)
def block_mask_names() -> tuple[str, ...]:
    """What `BlockMask.as_tuple` gives in this torch, by name, its last (the mask function) left out.

    The order changed between torch 2.11 and 2.13; it is read off a mask whose attributes are markers.
    """
    from torch.nn.attention.flex_attention import BlockMask

    marked = object.__new__(BlockMask)
    names: dict[int, str] = {}
    markers: list[object] = []  # alive as long as their identity counts

    def marker(name: str) -> Any:
        markers.append(object())
        names[id(markers[-1])] = name
        return markers[-1]

    for name in BlockMask.__annotations__:
        pair = name in ("seq_lengths", "BLOCK_SIZE")
        marked.__dict__[name] = (marker(f"{name}.0"), marker(f"{name}.1")) if pair else marker(name)
    return tuple(names[id(value)] for value in marked.as_tuple()[:-1])


def separate_outputs(nodes: Sequence[Node]) -> None:
    """One call for each output that is read, so that each is a region of its own."""
    for node in nodes:
        call = flex(node)
        if call is None:
            continue
        for taken in list(call.used.values())[1:]:
            with node.graph.inserting_before(taken):
                copy = node.graph.node_copy(node)
            taken.replace_input_with(node, copy)


def _module(node: Node, reference: Any) -> GraphModule | None:
    owner = node.graph.owning_module
    if owner is None or not isinstance(reference, Node) or reference.op != "get_attr":
        return None
    module = owner.get_submodule(str(reference.target))
    return module if isinstance(module, GraphModule) else None
