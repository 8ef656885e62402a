"""Are a call's block lists what its mask function says?

The compiled kernel obeys the lists, the eager one the function: where the two differ the model has two meanings, and
neither is ours to choose. The lists are computed as the program computes them, from its constants and from inputs that
are drawn, and compared with the function on the same values (`fxfuse.patterns.flex_attention.capturing.lists`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node

from fxfuse.graph.view import fake
from fxfuse.patterns.flex_attention.calls import Flex
from fxfuse.patterns.flex_attention.capturing.lists import MAX_POSITIONS, dense, disagreement, membership
from fxfuse.patterns.flex_attention.capturing.one_block import LARGE
from fxfuse.patterns.flex_attention.options import BlockMasks
from fxfuse.proof.evaluate import CannotEvaluate, Evaluator
from fxfuse.proof.sizes import Sizes
from fxfuse.recognise.answers import NEAR, Reason
from fxfuse.recognise.probe import Probe
from fxfuse.torch_seams import pytree

DRAWS = 3
_WAYS_OUT = (
    'block_mask="reconstruct" takes the lists as the compiled kernel does, block_mask="assume_mask_mod" the function '
    "alone"
)


def check_block_mask(call: Flex, ask: Probe, block_mask: BlockMasks) -> Reason | None:
    """None where the lists change nothing that the mask function says; else the reason not to fuse the call.

    Lists that name every block as partial say nothing. Others follow from the function at every size that is probed:
    beyond every number that either of them mentions, where a length is symbolic.
    """
    if block_mask == "assume_mask_mod":
        return None
    key = (*call.block_mask.values(), call.mask_mod, call.mask_buffers, call.query.name, call.key.name)
    if key not in ask.settled:
        ask.settled[key] = _wrong(call, ask)
    wrong = ask.settled[key]
    return None if wrong is None else Reason(f"flex_attention whose block lists {wrong}; {_WAYS_OUT}", NEAR + 1)


def _wrong(call: Flex, ask: Probe) -> str | None:
    """What is wrong with the lists, in words."""
    lists = call.block_mask
    block = (lists["BLOCK_SIZE.0"], lists["BLOCK_SIZE.1"])
    names = [n for n in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices") if lists.get(n)]
    nodes: list[Node] = [lists[n] for n in names]
    given = [n.name for n in nodes if n.op == "placeholder" and ask.depends_on_input(n)]
    if given:
        return f"are inputs of the program ({', '.join(given)}), of which nothing is known"
    buffers = [b for b in call.mask_buffers if isinstance(b, Node) and isinstance(b.meta.get("val"), torch.Tensor)]
    try:
        for draw in range(DRAWS):
            evaluator = _evaluator(call, ask)
            batch, heads, queries, _ = evaluator.sizes.shape(call.query)
            keys = evaluator.sizes.shape(call.key)[2]
            values = ask.leaf_values([*nodes, *buffers], evaluator, draw, cover=draw == 0)
            found = dict(zip(names, values, strict=False))
            partial = (found["kv_num_blocks"], found["kv_indices"])
            full = (found["full_kv_num_blocks"], found["full_kv_indices"]) if len(found) == 4 else None
            if _everything(partial, full, (-(-queries // block[0]), -(-keys // block[1]))):
                return None
            if batch * heads * queries * keys > MAX_POSITIONS:
                return f"are too large to compare with the mask function: {[batch, heads, queries, keys]} positions"
            captured = dict(zip(buffers, values[len(nodes) :], strict=True))
            kept = _kept(call, captured, evaluator, (batch, heads, queries, keys))
            difference = disagreement(kept, partial, full, block)
            if difference is not None:
                return f"are not what the mask function says: {difference}"
    except CannotEvaluate as error:
        return f"could not be compared with the mask function: {error}"
    return None


def _everything(
    partial: tuple[torch.Tensor, torch.Tensor], full: tuple[torch.Tensor, torch.Tensor] | None, blocks: tuple[int, int]
) -> bool:
    """Is every block listed as partial, once, and none as full? Then the function is asked everywhere."""
    listed = membership(*partial)[:, :, : blocks[0], : blocks[1]]
    once = bool((listed.sum(-1) == partial[0][:, :, : blocks[0]]).all())
    return tuple(listed.shape[-2:]) == blocks and once and bool(listed.all()) and (full is None or not full[0].any())


def _kept(
    call: Flex, captured: dict[Node, torch.Tensor], evaluator: Evaluator, shape: tuple[int, int, int, int]
) -> torch.Tensor:
    """What the mask function says at every position, [B, H, S, T]."""

    def value(buffer: Any) -> Any:
        if isinstance(buffer, Node):
            return captured[buffer] if buffer in captured else evaluator.sizes(buffer.meta["val"])
        return evaluator.sizes(buffer) if isinstance(buffer, torch.SymInt) else buffer

    buffers = [value(b) for b in call.mask_buffers]
    try:
        return dense(lambda *indices: evaluator.function(call.mask_mod)(*indices, *buffers), *shape).expand(shape)
    except Exception as error:
        raise CannotEvaluate(f"the mask function cannot run: {error}") from error


def _evaluator(call: Flex, ask: Probe) -> Evaluator:
    """At the program's sizes; what is symbolic exceeds every number in the lists' computation and in the function."""
    lengths: list[Any] = [fake(call.query).shape[2], fake(call.key).shape[2]]
    symbols = {s for length in lengths if isinstance(length, torch.SymInt) for s in length.node.expr.free_symbols}
    lists = [n for n in call.block_mask.values() if isinstance(n, Node)]
    if not symbols or call.block_mask["BLOCK_SIZE.0"] >= LARGE:  # one block holds any length
        return ask.evaluator()
    numbers = [*_numbers(_before(lists)), *_numbers(call.mask_mod.graph.nodes), call.block_mask["BLOCK_SIZE.0"]]
    return Evaluator(Sizes(ask.ranges, 0, preset=dict.fromkeys(symbols, max(numbers) + 3)))


def _before(nodes: Iterable[Node]) -> set[Node]:
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def _numbers(nodes: Iterable[Node]) -> Iterator[int]:
    for node in nodes:
        for arg in pytree.tree_leaves((node.args, dict(node.kwargs))):
            if (
                isinstance(arg, (int, float))
                and not isinstance(arg, bool)
                and math.isfinite(arg)
                and abs(arg) < 1 << 29
            ):
                yield int(abs(arg))
