"""The parts of an attention around its softmax (or SDPA call), and the regions they span."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxfuse.graph.region import Region, between, real_users
from fxfuse.graph.view import ARITHMETIC, CAST, LAYOUT, NO_OP, GraphView, argument, fake, is_random, op_name, tensor
from fxfuse.proof.sizes import Sizes
from fxfuse.recognise.answers import Reason
from fxfuse.recognise.contraction import Product, product, swapped
from fxfuse.recognise.questions import Questions
from fxfuse.recognise.walk import chain_back, chain_forward

SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
ANCHORS = SOFTMAX | {"exp"}
SDPA = "scaled_dot_product_attention"
_ELEMENTWISE = frozenset(
    [
        "tanh",
        "where",
        "masked_fill",
        "clamp",
        "clamp_min",
        "clamp_max",
        "minimum",
        "maximum",
        "sigmoid",
        "exp",
        "log",
        "pow",
        "square",
        "abs",
        "softplus",
        "relu",
        "logical_not",
        "logical_and",
        "logical_or",
        "bitwise_and",
        "bitwise_or",
        "bitwise_not",
    ]
)
_WRITTEN_OUT = (
    ARITHMETIC
    | CAST
    | NO_OP
    | {"exp", "sum", "amax", "max", "log_softmax", "logsumexp", "softmax", "log", "nan_to_num"}
)
"""What a softmax may be written out with, and what may lie between the weights and their product."""
_TRANSPOSES = frozenset({"transpose", "permute", "mT", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "adjoint"})
_SCALED = frozenset({"mul", "div", "neg", "true_divide", "multiply"})


@dataclass(frozen=True)
class Parts:
    """Where q, k, v, scores, weights and the result are. For SDPA all of them are at one node."""

    softmax: Node
    q: Node
    k: Node
    v: Node
    scores: Product | None
    weighted: Product | None
    output: Node


def find_parts(anchor: Node) -> tuple[Parts, ...] | Reason:
    """The products before and after a softmax; or the operands of an SDPA call.

    More than one reading where the scores are transposed on the way: which side is q shows when it is asked.
    """
    if op_name(anchor) == SDPA:
        if is_random(anchor):
            return Reason("attention, but its dropout is active", 2)
        q, k, v = (argument(anchor, n) for n in ("query", "key", "value"))
        return (Parts(anchor, q, k, v, None, None, anchor),)
    before = _scores(anchor)
    if before is None:
        return Reason("a softmax, but not of a product")
    after = _weighted(anchor)
    if isinstance(after, Reason):
        return after
    if op_name(anchor) in SOFTMAX and argument(anchor, "dim") not in (-1, fake(anchor).dim() - 1):
        return Reason("softmax of a product between two products, but not over the last axis, the keys", 2)
    readings = (before[0], swapped(before[0])) if before[1] else before[:1]
    return tuple(Parts(anchor, r.left, r.right, after.right, r, after, after.node) for r in readings)


def _scores(anchor: Node) -> tuple[Product, bool] | None:
    """The nearest product behind the anchor's input, through whatever is elementwise; and is it transposed there?"""
    source = anchor.args[0]
    assert isinstance(source, Node)
    seen, level = {source}, [source]
    transposed = False
    for _ in range(64):
        for node in level:
            if (found := product(node)) is not None:
                return found, transposed
        following = []
        for node in level:
            name = op_name(node)
            transposed = transposed or name in _TRANSPOSES
            if name in _WRITTEN_OUT or name in LAYOUT or name in _ELEMENTWISE:
                for i in node.all_input_nodes:
                    if i not in seen and (tensor(i) is not None or op_name(node) == "getitem"):
                        seen.add(i)
                        following.append(i)
        level = following
    return None


def _weighted(anchor: Node) -> Product | Reason:
    """The nearest product that the weights go into, as ``weights · V``."""
    seen, level = {anchor}, [anchor]
    for _ in range(10):
        following = []
        for node in level:
            for user in real_users(node):
                found = product(user)
                if found is not None and found.left in seen:
                    return found
                if found is not None and found.right in seen:
                    return swapped(found)
                if is_random(user):
                    return Reason("attention, but its dropout is active", 2)
                if user not in seen and (op_name(user) in _WRITTEN_OUT or op_name(user) in LAYOUT):
                    seen.add(user)
                    following.append(user)
        level = following
    return Reason("softmax of a product, but no product of the weights", 1)


def regions(view: GraphView, parts: Parts, ask: Questions) -> Iterator[Region]:
    """From q, k and v before any repeat, cast or transpose to the result behind its transpose; then narrower ones.

    The last take the operands with all their heads, however those were made.
    """
    sizes = ask.evaluator(0).sizes
    matrix = _matrices(parts, sizes)

    def chain(operand: Node, ranks: tuple[int, ...]) -> list[Node]:
        """What the operand is made of by moving and scaling alone, in a layout that the operator has."""
        reach = LAYOUT | CAST if operand is parts.v else LAYOUT | _SCALED | CAST
        found = []
        for node in chain_back(view, operand, lambda name: name in reach):
            if tensor(node) is None:
                continue
            if fake(node).dtype != fake(operand).dtype:
                break
            if fake(node).dim() in ranks and _may_hold_heads(sizes.shape(node), *matrix[operand]):
                found.append(node)
        return found

    def deepest(operand: Node, ranks: tuple[int, ...]) -> Node | None:
        return min(reversed(chain(operand, ranks)), key=lambda n: torch.Size(sizes.shape(n)).numel(), default=None)

    def nearest(operand: Node) -> Node | None:
        return next(iter(chain(operand, (4,))), None)

    def farthest(ranks: tuple[int, ...]) -> Node | None:
        found = None
        for node in chain_forward(parts.output, lambda name: name in LAYOUT or name in CAST):
            same = torch.Size(sizes.shape(node)).numel() == torch.Size(sizes.shape(parts.output)).numel()
            if not same or fake(node).dtype != fake(parts.output).dtype:
                break
            if fake(node).dim() in ranks:
                found = node
        return found

    def spans() -> Iterator[tuple[Node | None, ...]]:
        for ranks, out in (((3, 4), (3, 4)), ((3, 4), (4,)), ((4,), (4,)), ((4,), (3, 4))):
            yield (*(deepest(operand, ranks) for operand in (parts.q, parts.k, parts.v)), farthest(out))
        operands = nearest(parts.q), nearest(parts.k), nearest(parts.v)
        for output in (farthest((3, 4)), farthest((3,)), parts.output):
            yield *operands, output

    given = _beside(view, parts)
    tried: set[tuple[Node | None, ...]] = set()
    for span in spans():  # the first is mostly the one: the rest is not looked for then
        if None in span or span in tried:
            continue
        tried.add(span)
        *sources, output = (node for node in span if node is not None)
        region = between(view, output, sources, lambda _: True, given=given)
        if region is not None and parts.softmax in region.nodes:
            yield region


def _matrices(parts: Parts, sizes: Sizes) -> dict[Node, tuple[int, int]]:
    """Positions and features of a head of q, k and v."""
    shapes = {n: torch.empty(sizes.shape(n), device="meta") for n in (parts.q, parts.k, parts.v)}
    if parts.scores is None or parts.weighted is None:
        return {n: (t.shape[-2], t.shape[-1]) for n, t in shapes.items()}
    q, k = parts.scores.rows(shapes[parts.q]), parts.scores.columns(shapes[parts.k])
    v = parts.weighted.columns(shapes[parts.v]).transpose(-1, -2)
    return {n: (t.shape[-2], t.shape[-1]) for n, t in ((parts.q, q), (parts.k, k), (parts.v, v))}


def _may_hold_heads(shape: tuple[int, ...], length: int, size: int) -> bool:
    """``[B, S, H·D]``, ``[B, S, H, D]`` or ``[B, H, S, D]``?"""
    if len(shape) == 3:
        return shape[1] == length and shape[2] % size == 0
    return shape[3] == size and length in shape[1:3]


def _beside(view: GraphView, parts: Parts) -> list[Node]:
    """The tensors that meet the scores on their way to the weights, q, k and v excepted: masks, biases, sinks."""
    if parts.scores is None or parts.weighted is None:
        mask = argument(parts.softmax, "attn_mask")
        return [mask] if isinstance(mask, Node) else []
    way = between(view, parts.weighted.left, [parts.scores.node], lambda _: True)
    if way is None:
        return []
    behind = {n for operand in (parts.q, parts.k, parts.v) for n in chain_back(view, operand, lambda _: True)}
    inside = set(way.nodes)
    beside = {i for n in way.nodes for i in n.all_input_nodes if i not in inside and tensor(i) is not None}
    return [n for n in beside if n not in behind and n is not parts.scores.node]


def anchor_of(region: Region) -> Node:
    """The softmax or SDPA call of a region; an exponential where there is neither."""
    kinds: tuple[Container[str], ...] = ({SDPA}, SOFTMAX, ANCHORS)
    return next(n for kind in kinds for n in region.nodes if op_name(n) in kind)
