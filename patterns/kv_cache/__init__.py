"""A growing cache: Attention that reads past and new keys joined, as Attention with a past and a present.

Source: `past_key`, `past_value` and `present_key`, `present_value` of https://onnx.ai/onnx/operators/onnx__Attention.html

    past k ─┐                                      q ─ k ─ v ─ past k ─ past v
    new k ──┴─ cat ─┬─ present k                              │
               q ───┴─ Attention ── y        becomes      Attention ── y, present k, present v
    new v ──┬─ cat ─┴─ present v
    past v ─┘

This pattern runs after the one that finds the attention. P is the number of past keys, S that of new ones. The caches
are [B, H, P, D], as ONNX has them; the new keys may also be [B, S, H·D], as they are before their heads are split and
transposed.

The node always has all three outputs, because ONNX Runtime has no kernel for a past without a present, and optimizers
remove outputs that nobody reads. Keys that are joined for this attention alone (to learned keys, say) are therefore no
cache: nobody reads their present, and they stay joined.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from fxfuse.graph.region import Region, between, real_users
from fxfuse.graph.view import LAYOUT, GraphView, argument, fake, op_name, tensor
from fxfuse.recognise.answers import Form, Found, Proposal, Reason
from fxfuse.recognise.probe import Probe
from fxfuse.recognise.walk import backward, chain_back

JOINS = frozenset(["cat", "concat", "concatenate"])
CHANGES = frozenset(["rotary_embedding", "rms_norm", "mul", "add", "to", "type_as"])
"""What models compute on cached keys before they attend to them; with it the cached keys are not those attended to."""
CASTS = frozenset(["to", "type_as"])
"""Casts; mostly to the type that the keys have already."""
_ATTENTION = torch.ops.fxfuse.attention.default


class KVCache:
    """A cache that grows by concatenation, whatever the layout of the new keys."""

    name = "kv_cache"
    operator = "KVCache"
    since_opset = 23
    after = ("attention", "flex_attention")
    """A cache is one where an attention reads it."""

    def propose(self, view: GraphView, ask: Probe) -> Iterator[Proposal]:
        claimed: set[Node] = set()
        for node in view.nodes:
            if node.target is not _ATTENTION or len(node.args) > 4:
                continue
            joins = _joins(view, node)
            if joins is None or (isinstance(joins, tuple) and claimed & set(joins)):
                continue  # these keys are the present of an earlier attention, and this one reads them from there
            if isinstance(joins, Reason):
                yield Proposal(node, (), missed=joins)
                continue
            claimed.update(joins)
            yield Proposal(node, _regions(view, node, joins), best_rank=0)

    def recognise(self, region: Region, ask: Probe) -> Found | Reason:
        node = region.output
        q, _, _, past_key, _ = region.sources
        if node.kwargs.get("is_causal"):
            return Reason("attention over a cache, but causal from the first of all keys on, not of the new ones", 2)
        mask = argument(node, "attn_mask")
        place = region.others.index(region.view.canonical(mask)) if isinstance(mask, Node) else None
        parameters = {
            "past": [str(size) for size in region.view.shape(past_key)],
            "present": [n.name for n in region.more_outputs],
        }
        heads = _number(fake(region.more_outputs[0]).shape[1])
        q_heads = _number(node.kwargs.get("q_num_heads") or fake(node).shape[1])
        attributes: dict[str, Any] = {n: v for n, v in node.kwargs.items() if n in ("scale", "softcap")}
        if fake(q).dim() == 3:
            if heads is None or q_heads is None:
                return Reason("attention over a cache, but how many heads there are is not known", 2)
            attributes |= {"q_num_heads": q_heads, "kv_num_heads": heads}
        form = _form(fake(node).dim(), attributes, place)
        hidden = () if place is None else ((place, 1.0),)
        return Found(self.operator, parameters, (form,), ulp=4.0, averaging=True, masks=hidden)


def _number(size: Any) -> int | None:
    """The size if it is known, else None. Sizes of transformers' caches may be symbols that stand for one number."""
    if isinstance(size, torch.SymInt):
        return int(size.node.expr) if size.node.expr.is_number else None
    return int(size)


def _form(rank: int, attributes: dict[str, Any], place: int | None) -> Form:
    def attention(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, past_key, past_value = inputs[:5]
        mask = None if place is None else inputs[5 + place]
        y, *present = torch.ops.fxfuse.attention_with_present(q, k, v, mask, past_key, past_value, **attributes)
        if y.dim() == 3 and rank == 4:
            y = torch.unflatten(y, 2, (attributes["q_num_heads"], -1)).transpose(1, 2)
        return y, *present

    return attention


def _joins(view: GraphView, node: Node) -> tuple[Node, Node] | Reason | None:
    """The concatenations that give an attention its keys and its values; None where there is none."""
    found = []
    for operand in node.args[1:3]:
        assert isinstance(operand, Node)
        way = chain_back(view, operand, lambda name: name in (LAYOUT | CASTS) - JOINS)
        join = next((n for n in way if op_name(n) in JOINS), None)
        found.append(join if join is None or fake(join).dtype == fake(operand).dtype else None)
    key, value = found
    if key is None and value is not None and _is_cache(value):
        changed = _changed(view, node.args[1])  # type: ignore[arg-type]
        if changed is None:
            return None
        name = op_name(changed)
        return Reason(f"attention over a growing cache, but its keys go through {name} after they are cached", 2)
    if key is None or value is None or key is value:
        return None
    for join in (key, value):
        if not _is_cache(join):
            return None
        dims = fake(join).dim()
        axis = (join.args[1] if len(join.args) > 1 else join.kwargs.get("dim", 0)) or 0
        assert isinstance(axis, int)
        if dims != 4 or axis % dims != 2:
            return Reason(f"attention over a growing cache, but of its {dims} axes {axis % dims} grows, not 2", 2)
        before = [u for u in real_users(_present(join)) if view.order.get(u, -1) < view.order[node]]
        early = [u for u in before if not _leads(u, node)]
        if all(_leads(user, node) or op_name(user) == "sym_size" for user in real_users(_present(join))):
            return None
        if early:
            return Reason(f"attention over a growing cache, but {early[0].name} reads it before the attention does", 2)
    return key, value


def _present(join: Node) -> Node:
    """The node through which all keys are read: the concatenation, or a cast of it to the type that it has already."""
    users = real_users(join)
    cast = users[0] if len(users) == 1 and op_name(users[0]) in CASTS else join
    return cast if fake(cast).dtype == fake(join).dtype else join


def _is_cache(join: Node) -> bool:
    """Does it join two tensors, the first of which is an input or a buffer, perhaps viewed otherwise, but not
    computed?"""
    operands = join.args[0]
    if not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return False
    past: Any = operands[0]
    while isinstance(past, Node) and op_name(past) in LAYOUT - JOINS:
        past = past.args[0]
    return isinstance(past, Node) and past.op == "placeholder" and tensor(past) is not None


def _changed(view: GraphView, operand: Node) -> Node | None:
    """The last call that computes on cached keys on their way to the attention; None if none does."""
    behind = backward(view, operand, lambda name: name in (LAYOUT | CHANGES) - JOINS)
    if not any(op_name(n) in JOINS and _is_cache(n) for n in behind):
        return None
    return next((n for n in (operand, *behind) if op_name(n) in CHANGES), None)


def _leads(user: Node, node: Node) -> bool:
    """Do all ways from `user` lead to `node`, through nothing but views?"""
    return user is node or (bool(user.users) and op_name(user) in LAYOUT and all(_leads(u, node) for u in user.users))


def _regions(view: GraphView, node: Node, joins: tuple[Node, Node]) -> Iterator[Region]:
    """The regions to try: from q, k and v before their heads were transposed, then from q, k and v as they meet the
    past."""
    operands: list[Any] = [node.args[0], *(join.args[0][1] for join in joins)]  # type: ignore[index,union-attr]
    past: list[Any] = [join.args[0][0] for join in joins]  # type: ignore[index,union-attr]
    mask = argument(node, "attn_mask")
    flat = [_flat(view, operand) for operand in operands]
    whole = operands if fake(operands[0]).dim() == 4 else [None]
    for sources in (flat, whole):
        if None in sources:
            continue
        region = between(view, node, [*sources, *past], lambda _: True, given=[mask] if isinstance(mask, Node) else ())
        if region is not None and all(join in region.nodes for join in joins):
            presents = tuple(_present(join) for join in joins)
            yield Region(view, node, region.sources, region.others, region.nodes, more_outputs=presents)


def _flat(view: GraphView, operand: Node) -> Node | None:
    """The tensor [B, S, H·D] that the operand is a view of; None if there is none."""
    way = chain_back(view, operand, lambda name: name in LAYOUT)
    return next((n for n in way if tensor(n) is not None and fake(n).dim() == 3), None)


PATTERN = KVCache()
