"""The parts of an attention around its softmax (or SDPA call), and the regions they span."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxfuse.graph.region import Region, between, real_users
from fxfuse.graph.source import place_of
from fxfuse.graph.view import (
    ARITHMETIC,
    CAST,
    LAYOUT,
    NO_OP,
    GraphView,
    argument,
    fake,
    is_random,
    op_name,
    size_text,
    tensor,
)
from fxfuse.patterns.attention.contraction import Product, product, products, swapped
from fxfuse.patterns.attention.score_paths import ELEMENTWISE, PADS, SOFTMAX
from fxfuse.proof.sizes import Sizes
from fxfuse.recognise.answers import Reason
from fxfuse.recognise.probe import Probe
from fxfuse.recognise.walk import chain_back, chain_forward

ANCHORS = SOFTMAX | {"exp"}
SDPA = "scaled_dot_product_attention"
_WRITTEN_OUT = (
    ARITHMETIC
    | CAST
    | NO_OP
    | PADS
    | {"exp", "sum", "amax", "max", "log_softmax", "logsumexp", "softmax", "log", "nan_to_num", "masked_fill", "where"}
)
"""What a softmax may be written out with, and what may lie between the weights and their product."""
_MIXING = frozenset({"einsum", "matmul", "linear", "conv2d"})
_TRANSPOSES = frozenset({"transpose", "permute", "mT", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "adjoint"})
_RANKS = (2, 3, 4, 5, 6)
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

    There is more than one reading where the graph alone does not show which side is q, or which axes are queries and
    keys. Following the scores decides then (`fxfuse.patterns.attention.score_paths`).
    """
    if op_name(anchor) == SDPA:
        if is_random(anchor):
            return Reason("attention, but its dropout is active", 2)
        q, k, v = (argument(anchor, n) for n in ("query", "key", "value"))
        return (Parts(anchor, q, k, v, None, None, anchor),)
    before = _scores(anchor)
    if before is None:
        return _mixed(anchor) or Reason("a softmax, but not of a product")
    after = _weighted(anchor)
    if isinstance(after, Reason):
        return after
    readings = products(before[0])
    if before[1] or _axis(anchor) != -1 or len(readings) > 1 or len(after) > 1:
        readings = (*readings, *map(swapped, readings))
    return tuple(Parts(anchor, r.left, r.right, a.right, r, a, a.node) for r in readings for a in after)


def _axis(anchor: Node) -> int:
    """The axis of a softmax, counted from the last (-1); -1 for a softmax that is written out."""
    if op_name(anchor) not in SOFTMAX:
        return -1
    axis, rank = argument(anchor, "dim"), fake(anchor).dim()
    return int(axis) % rank - rank


def _scores(anchor: Node) -> tuple[Node, bool] | None:
    """The nearest product that the anchor's input is computed from through elementwise calls, and whether it is
    transposed on the way."""
    source = anchor.args[0]
    assert isinstance(source, Node)
    seen, level = {source}, [source]
    transposed = False
    for _ in range(64):
        for node in level:
            if product(node) is not None:
                return node, transposed
        following = []
        for node in level:
            name = op_name(node)
            transposed = transposed or name in _TRANSPOSES
            if name in _WRITTEN_OUT or name in LAYOUT or name in ELEMENTWISE:
                for i in node.all_input_nodes:
                    if i not in seen and (tensor(i) is not None or op_name(node) == "getitem"):
                        seen.add(i)
                        following.append(i)
        level = following
    return None


def _mixed(anchor: Node) -> Reason | None:
    """A product of the shape of the scores behind something that mixes its heads (talking heads), if there is one."""
    source = anchor.args[0]
    assert isinstance(source, Node)
    if op_name(anchor) not in SOFTMAX or isinstance(_weighted(anchor), Reason):
        return None
    shape = sorted(size_text(d) for d in fake(source).shape)
    ways: list[tuple[Node, Node | None]] = [(source, None)]
    seen = {source}
    for node, mixing in ways:
        if mixing is not None and product(node) is not None:
            if sorted(size_text(d) for d in fake(node).shape) == shape:
                what = f"{op_name(mixing)}@{place_of(mixing)}"
                return Reason(
                    f"softmax attention, but the scores of different heads or positions are mixed ({what})", 3
                )
            continue
        mixes = op_name(node) in _MIXING
        if mixes or op_name(node) in _WRITTEN_OUT or op_name(node) in LAYOUT or op_name(node) in ELEMENTWISE:
            for i in node.all_input_nodes:
                if i not in seen and tensor(i) is not None and len(ways) < 40:
                    seen.add(i)
                    ways.append((i, node if mixes else mixing))
    return None


def _weighted(anchor: Node) -> tuple[Product, ...] | Reason:
    """The nearest product that the weights go into, as ``weights · V``, in each way that it can be seen."""
    seen, level = {anchor}, [anchor]
    for _ in range(10):
        following = []
        for node in level:
            for user in real_users(node):
                found = products(user)
                if found and found[0].left in seen:
                    return found
                if found and found[0].right in seen:
                    return tuple(map(swapped, found))
                if is_random(user):
                    return Reason("attention, but its dropout is active", 2)
                if user not in seen and (op_name(user) in _WRITTEN_OUT or op_name(user) in LAYOUT):
                    seen.add(user)
                    following.append(user)
        level = following
    return Reason("softmax of a product, but no product reads the weights", 1)


def regions(view: GraphView, parts: Parts, ask: Probe) -> Iterator[Region]:
    """Regions to try, the widest first: from q, k and v before any repeat, cast or transpose to the transposed result.

    The last ones take k and v with their heads as they enter the products, repeated or not.
    """
    sizes = ask.evaluator(0).sizes
    matrix = _matrices(parts, sizes)

    def chain(operand: Node, ranks: tuple[int, ...], usual: bool) -> list[Node]:
        """What the operand is made of by moving and scaling alone: in a layout that the operator has, or in any."""
        reach = LAYOUT | CAST if operand is parts.v else LAYOUT | _SCALED | CAST
        found = []
        for node in chain_back(view, operand, lambda name: name in reach):
            if tensor(node) is None:
                continue
            if fake(node).dtype != fake(operand).dtype:
                break
            held = _holds_heads if usual else _may_hold_heads
            if fake(node).dim() in ranks and held(sizes.shape(node), *matrix[operand]):
                found.append(node)
        return found

    def deepest(operand: Node, ranks: tuple[int, ...], usual: bool = True) -> Node | None:
        nodes = reversed(chain(operand, ranks, usual))
        return min(nodes, key=lambda n: torch.Size(sizes.shape(n)).numel(), default=None)

    def nearest(operand: Node) -> Node | None:
        return next(iter(chain(operand, (4,), True)), None)

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
        operands = parts.q, parts.k, parts.v
        for ranks, out in (((3, 4), (3, 4)), ((3, 4), (4,)), ((4,), (4,)), ((4,), (3, 4))):
            yield (*(deepest(operand, ranks) for operand in operands), farthest(out))
        near = tuple(map(nearest, operands))
        for output in (farthest((3, 4)), farthest((3,)), parts.output):
            yield *near, output
        # Any other layout (time first, heads in the batch, windows on an axis of their own) is moved into place.
        usual = [deepest(operand, (3, 4)) for operand in operands]
        moved = [deepest(operand, _RANKS, False) for operand in operands]
        output = farthest(_RANKS)
        yield *moved, output
        yield *(u or m for u, m in zip(usual, moved, strict=True)), output
        yield *moved, parts.output
        yield *operands, output
        yield *operands, parts.output

    given, shared = _beside(view, parts)
    tried: set[tuple[Node | None, ...]] = set()
    for span in spans():  # a generator, because the first is mostly right and the others then need not be looked for
        if None in span or span in tried:
            continue
        tried.add(span)
        *sources, output = (node for node in span if node is not None)
        region = between(view, output, sources, lambda _: True, given=given, shared=shared)
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
    """May a tensor of this shape hold heads of so many positions and features, on whatever axes?"""
    return torch.Size(shape).numel() % (length * size) == 0 and any(n % size == 0 for n in shape)


def _holds_heads(shape: tuple[int, ...], length: int, size: int) -> bool:
    """Does this shape read as ``[B, S, H·D]``, ``[B, S, H, D]`` or ``[B, H, S, D]``?"""
    if len(shape) == 3:
        return shape[1] == length and shape[2] % size == 0
    return shape[3] == size and length in shape[1:3]


def _beside(view: GraphView, parts: Parts) -> tuple[list[Node], list[Node]]:
    """The tensors that meet the scores on their way to the weights, q, k and v excepted: masks, biases, sinks.

    Those that meet them in more than one form are the second list.
    """
    if parts.scores is None or parts.weighted is None:
        mask = argument(parts.softmax, "attn_mask")
        return ([mask] if isinstance(mask, Node) else []), []
    way = between(view, parts.weighted.left, [parts.scores.node], lambda _: True)
    if way is None:
        return [], []
    behind = {n for operand in (parts.q, parts.k, parts.v) for n in chain_back(view, operand, lambda _: True)}
    inside = set(way.nodes)
    beside = {i for n in way.nodes for i in n.all_input_nodes if i not in inside and tensor(i) is not None}
    given = [n for n in beside if n not in behind and n is not parts.scores.node]
    forms = {node: [n for n in _forms_of(node) if fake(n).dtype == torch.bool] for node in given}
    common = {
        node: next((n for n in own if any(n in others for m, others in forms.items() if m is not node)), None)
        for node, own in forms.items()
    }
    # ``~keep`` hides keys and ``keep`` clears weights. Drawn independently they would contradict each other.
    return [n for n, one in common.items() if one is None], [n for n in dict.fromkeys(common.values()) if n is not None]


def _forms_of(node: Node) -> Iterator[Node]:
    """The node, and what it is computed of element by element, as long as that is one tensor of its shape."""
    for _ in range(16):
        yield node
        inputs = [i for i in node.all_input_nodes if tensor(i) is not None]
        if node.op != "call_function" or len(inputs) != 1:
            return
        shapes = [[size_text(d) for d in fake(n).shape] for n in (node, inputs[0])]
        if shapes[0] != shapes[1]:
            return
        node = inputs[0]


def anchor_of(region: Region) -> Node:
    """The softmax or SDPA call of a region; an exponential where there is neither."""
    kinds: tuple[Container[str], ...] = ({SDPA}, SOFTMAX, ANCHORS)
    return next(n for kind in kinds for n in region.nodes if op_name(n) in kind)
