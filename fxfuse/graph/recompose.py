"""What torch's own decompositions took apart, read as the call that it was.

`run_decompositions()` leaves no `scaled_dot_product_attention`. What it becomes is core ATen: products of folded heads,
and a softmax that gives 0 to rows of −inf, which is read as `_safe_softmax` here; or one of the backends' own calls,
which give more than one result. What no fused region took in is taken apart again.

Source: `safe_softmax` and `scaled_dot_product_flash_attention_for_cpu` in torch/_decomp/decompositions.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fxfuse.graph.marks import FUNCTIONAL
from fxfuse.graph.view import argument, op_name
from fxfuse.torch_seams import schema_of

_BACKENDS = frozenset(
    [
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_attention_math",
    ]
)


@dataclass(frozen=True)
class Recomposed:
    """One call, and the nodes that it was."""

    node: Node
    parts: tuple[Node, ...]
    """Erased, in graph order; the last gave the value."""
    saved: dict[Node, tuple[Any, dict[str, Any]]]
    """Their arguments."""
    given: tuple[Node, ...]
    """What they read of the rest of the graph, as `node` reads it."""


def recompose(graph: Graph) -> list[Recomposed]:
    """Put the calls that were taken apart back together while regions are matched; `take_apart` undoes what is left."""
    found = []
    for node in list(graph.nodes):
        read = _READINGS.get(op_name(node))
        taken = None if read is None else read(node)
        if taken is None:
            continue
        target, args, kwargs, parts = taken
        inside = set(parts)
        if any(user not in inside for part in parts[:-1] for user in part.users):
            continue  # a value in between is read by somebody else, and has to stay
        with graph.inserting_before(node):
            call = graph.call_function(target, args, kwargs)
        call.meta = {**{k: v for k, v in node.meta.items() if k != "tensor_meta"}, FUNCTIONAL: True}
        given = tuple(n for n in dict.fromkeys(i for p in parts for i in p.all_input_nodes) if n not in inside)
        if set(given) != set(call.all_input_nodes):
            graph.erase_node(call)
            continue
        saved = {part: (part.args, dict(part.kwargs)) for part in parts}
        node.replace_all_uses_with(call, propagate_meta=False)
        for part in reversed(parts):
            graph.erase_node(part)
        found.append(Recomposed(call, parts, saved, tuple(call.all_input_nodes)))
    return found


def take_apart(graph: Graph, recomposed: list[Recomposed]) -> None:
    """Take the calls apart again that no fused region took in."""
    alive = set(graph.nodes)
    for one in reversed(recomposed):
        if one.node not in alive:
            continue
        env: dict[Node, Node] = dict(zip(one.given, one.node.all_input_nodes, strict=True))
        with graph.inserting_before(one.node):
            for part in one.parts:
                args, kwargs = map_arg(one.saved[part], env.__getitem__)
                env[part] = graph.create_node(part.op, part.target, args, kwargs)
                env[part].name, env[part].meta = part.name, part.meta
        one.node.replace_all_uses_with(env[one.parts[-1]], propagate_meta=False)
        graph.erase_node(one.node)


_Taken = tuple[Any, tuple[Any, ...], dict[str, Any], tuple[Node, ...]]


def _safe_softmax(node: Node) -> _Taken | None:
    """where(every score of the row is −inf, 0, softmax)"""
    condition, zeros, softmax = node.args[:3] if len(node.args) > 2 else (None, None, None)
    if not (isinstance(condition, Node) and isinstance(softmax, Node) and op_name(softmax) in ("softmax", "_softmax")):
        return None
    scores, dim = softmax.args[:2]
    hidden = _row_is_hidden(condition, scores, dim)
    if hidden is None or not _is_zero(zeros):
        return None
    dtype = node.meta["val"].dtype
    kwargs = {} if dtype == scores.meta["val"].dtype else {"dtype": dtype}  # type: ignore[union-attr]
    parts = {*hidden, softmax, node} | ({zeros} if isinstance(zeros, Node) else set())
    ordered = tuple(n for n in node.graph.nodes if n in parts)
    return torch.ops.aten._safe_softmax.default, (scores, dim), kwargs, ordered


def _row_is_hidden(condition: Node, scores: Any, dim: Any) -> list[Node] | None:
    """The nodes of ``all(scores == −inf, dim, keepdim)``, or ``not any(not (scores == −inf))``; None if it is not."""
    negated, parts, node = False, [], condition
    over = None
    while True:
        name = op_name(node)
        parts.append(node)
        if name in ("logical_not", "bitwise_not"):
            negated = not negated
        elif name in ("any", "all") and over is None:
            if argument(node, "dim") != dim or not argument(node, "keepdim") or (name == "any") != negated:
                return None
            over = node
        elif name in ("eq", "ne") and over is not None:
            infinite = node.args[0] is scores and node.args[1] == -math.inf
            return parts if infinite and (name == "ne") == negated else None
        else:
            return None
        source = node.args[0]
        if not isinstance(source, Node):
            return None
        node = source


def _is_zero(value: Any) -> bool:
    if not isinstance(value, Node):
        return bool(value == 0)
    if op_name(value) in ("zeros_like", "zeros"):
        return True
    if op_name(value) in ("full_like", "full", "scalar_tensor"):
        filled = value.args[0] if op_name(value) == "scalar_tensor" else value.args[1]
        return isinstance(filled, (int, float)) and filled == 0
    return False


def _backend(node: Node) -> _Taken | None:
    """The first result of a backend's own attention."""
    call, place = node.args
    if not isinstance(call, Node) or op_name(call) not in _BACKENDS or place != 0:
        return None
    names = [a.name for a in schema_of(call.target).arguments]
    mask = next((argument(call, n) for n in ("attn_mask", "attn_bias") if n in names), None)
    operands = tuple(argument(call, n) for n in ("query", "key", "value"))
    kwargs = {
        name: value
        for name, value in (
            ("attn_mask", mask),
            ("dropout_p", argument(call, "dropout_p")),
            ("is_causal", argument(call, "is_causal")),
            ("scale", argument(call, "scale")),
            ("enable_gqa", argument(call, "enable_gqa")),
        )
        if value not in (None, False, 0.0)
    }
    if kwargs.get("is_causal") and mask is not None:
        return None  # scaled_dot_product_attention takes a mask or is_causal, not both
    return torch.ops.aten.scaled_dot_product_attention.default, operands, kwargs, (call, node)


_READINGS: dict[str, Callable[[Node], _Taken | None]] = {"where": _safe_softmax, "getitem": _backend}
