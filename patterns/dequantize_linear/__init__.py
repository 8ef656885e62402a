"""Weights that are stored as integers: (x - zero point) · scale, as DequantizeLinear.

Source: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html

    x, kept as int8 or uint8 ── to float ── less zero points ── times scales ── y      anchor: y, the last that is made
                                                                                       of what is kept alone
    a · (x to float) ── times scales, a column of the product each          becomes    a · DequantizeLinear(x)

A region from stored integers to y is run, and asked: is each element of y one of the integers less a whole number,
times another number, and which elements of which tensors are those two? From the answers follow the blocks, however the
model's author spelled them: torchao's `dequantize_affine`, groups made by a reshape, rows that are broadcast. A product
is asked the same with a unit matrix for a.

The rewrite is proven over the whole range of the stored type and of that of the zero points. Zero points of a wider
type are taken only if all that they hold is known to fit (`frozen=True`, and every export). y has to be the same bit by
bit. If it is not, a smaller part of the computation is tried; if only the cast is left, the scale is 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfuse.graph.region import Region, real_users
from fxfuse.graph.smaller import smaller
from fxfuse.graph.view import ARITHMETIC, CAST, LAYOUT, GraphView, fake, is_float, is_pure, is_size, op_name, tensor
from fxfuse.ops.dequantize_linear import stored_as
from fxfuse.patterns.dequantize_linear.forms import Dequantized, dequantized, is_exact
from fxfuse.patterns.dequantize_linear.scaled_integers import scaled_integers
from fxfuse.patterns.dequantize_linear.unpacked import BITS, Unpacked, chosen_by, is_packed, tables, types_of, unpacked
from fxfuse.proof.positions.whole import cannot_wrap
from fxfuse.recognise.answers import NEAR, Form, Found, Input, Proposal, Reason
from fxfuse.recognise.kept import SMALL, size_in_bytes
from fxfuse.recognise.probe import Probe
from fxfuse.recognise.widened import widened
from fxfuse.torch_seams import schema_of

DEQUANTIZES = frozenset(
    ["dequantize_affine", "dequantize_per_tensor", "dequantize_per_channel", "dequantize_per_channel_group"]
)
"""Operators of torchao and of torch's `quantized_decomposed`."""
_TURNS = frozenset(["t", "transpose", "permute", "swapaxes", "swapdims", "movedim", "mT", "numpy_T", "T"])
_KEPT_AS_IS = frozenset(["clone", "contiguous", "alias", "detach"])
_PRODUCTS = frozenset(["mm", "matmul", "linear"])
_REPEATS = frozenset(["repeat_interleave", "expand", "expand_as", "broadcast_to", "repeat", "tile", "index"])
"""Operators that repeat elements. The region reads scales and zero points in front of these, as they are kept."""
_LIMIT = 40
"""The most nodes of a region."""
_BACK = 8
"""How many nodes in front of the last one are tried as the end of a region, if the last one does not do."""


def _walked(name: str) -> bool:
    return name in ARITHMETIC or name in CAST or name in LAYOUT or name in DEQUANTIZES or name in BITS


class DequantizeLinear:
    """Stored integers, turned into the numbers that they stand for."""

    name = "dequantize_linear"
    operator = "DequantizeLinear"
    since_opset = 23
    after = ("cache_write",)
    """The others read caches of integers and scales as the model writes them."""

    def propose(self, view: GraphView, ask: Probe) -> Iterator[Proposal]:
        leaves = sorted(ask.kept.stored(view.nodes), key=size_in_bytes, reverse=True)
        # An end that several tensors lead to belongs to the largest: the integers; the others are zero points.
        ends = {end: leaf for leaf in reversed(leaves) for end in _ends(leaf, ask)}
        for leaf in leaves:
            for end in (e for e, largest in ends.items() if largest is leaf):
                for product, y in _scaled_products(end, ask):
                    scaled = _region(view, ask, leaf, y, product.args[0])
                    yield Proposal(y, () if scaled is None else (scaled,), best_rank=0)
                outputs = list(_outputs(end, leaf))
                if _is_shuffled(view, ask, leaf, outputs[0]):
                    for product in _products(end):
                        shuffled = _region(view, ask, leaf, product, product.args[0])
                        yield Proposal(product, () if shuffled is None else (shuffled,), best_rank=0)
                if fake(leaf).dtype not in SMALL and not _is_packed(view, ask, leaf, outputs[0]):
                    continue  # the weight is kept in a type as large as the result
                regions = [r for r in (_region(view, ask, leaf, y) for y in outputs) if r is not None]
                why = None if regions else Reason("it cannot be evaluated at any size that can be run", NEAR)
                yield Proposal(outputs[0], regions, missed=why, nodes=(end,), best_rank=0)
        for found in widened(view.nodes, ask.kept):
            if not _walked(op_name(found.read)):
                why = f"it is made by {op_name(found.read)}, and DequantizeLinear only scales: {found.sizes}"
                yield Proposal(found.read, (), missed=Reason(why, NEAR), nodes=(found.read,))

    def recognise(self, region: Region, ask: Probe) -> Found | Reason:
        small = region.asked
        if any(fake(n).dtype == torch.float64 for n in (region.output, *region.others)):
            return Reason("it computes in float64, and DequantizeLinear does not", NEAR)
        ask.read_leaves = ask.read_leaves or small.narrowed
        part = unpacked(small)
        kind = None if part is None else _type(ask, part)
        if part is None or kind is None:
            return Reason(
                "it is packed, and its integers do not stand at one place, or are not known to fit a byte", NEAR
            )
        evaluator = ask.evaluator()
        held = {n: ask.draws([n], evaluator, 0)[0] for n in chosen_by(part.after)}
        found = scaled_integers(part.after, evaluator, [region.others[p].name for p in part.places], held)
        if isinstance(found, Reason):
            return found
        groups = {part.after.others.index(n): value for n, value in held.items()}
        how = dequantized(found, part.after, kind, groups)
        if isinstance(how, Reason):
            return how
        product = len(region.sources) > 1
        if how.grouped is not None and product and how.order[how.grouped.axis] != 0:
            return Reason("its groups are not of what the product runs over", NEAR)
        shape = _shape(region)
        beside = len(region.sources)
        parameters: dict[str, Any] = {
            "axis": how.blocks.axis,
            "block_size": how.blocks.size_of([shape[a] for a in how.order]),
            "scale": [Input(beside + part.places[p.place]) for p in found.scales] or found.factor,
            "zero_point": [Input(beside + part.places[p.place]) for p in found.zeros] or found.zero,
            "stored": partial(_stored, how, ask),
        }
        if how.grouped is not None:
            parameters["groups"] = Input(beside + part.places[how.grouped.place])
        out = fake(region.output).dtype
        kinds = how.scale_types(part.after.others)
        forms = tuple(_form(region, how, kind) for kind in dict.fromkeys((*kinds, out)))
        return Found(self.operator, parameters, forms, ulp=4.0 if product else 0.0, averaging=product)


def _ends(leaf: Node, ask: Probe) -> Iterator[Node]:
    """The last floating-point nodes that are computed only from this tensor and others that the program keeps."""
    seen, stack = {leaf}, [leaf]
    found: dict[Node, None] = {}
    while stack:
        node = stack.pop()
        for user in real_users(node):
            if _walked(op_name(user)) and tensor(user) is not None and user in ask.kept:
                if user not in seen:
                    seen.add(user)
                    stack.append(user)
            elif is_float(node):
                found[node] = None
    yield from found


def _outputs(end: Node, leaf: Node) -> Iterator[Node]:
    """Nodes at which a region may end: in front of the last transposes, which stay as they are; then further back."""
    node = end
    while op_name(node) in _TURNS | _KEPT_AS_IS and is_float(_first(node)):
        node = _first(node)
    for _ in range(_BACK):
        yield node
        before = [i for i in node.all_input_nodes if is_float(i) and _comes_from(i, leaf)]
        if len(before) != 1:
            return
        node = before[0]


def _first(node: Node) -> Node:
    first = node.args[0]
    assert isinstance(first, Node)
    return first


def _comes_from(node: Node, leaf: Node) -> bool:
    stack, seen = [node], set[Node]()
    while stack:
        current = stack.pop()
        if current is leaf:
            return True
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return False


def _scaled_products(end: Node, ask: Probe) -> Iterator[tuple[Node, Node]]:
    """Products with the weight whose result is multiplied by tensors that the program keeps: (product, scaled
    result)."""
    for product in _products(end):
        users = real_users(product)
        while len(users) == 1 and op_name(users[0]) in CAST:
            users = real_users(users[0])
        if len(users) == 1 and op_name(users[0]) in ("mul", "div"):
            tensors = [i for i in users[0].all_input_nodes if tensor(i) is not None]
            if len(tensors) == 2 and any(i in ask.kept for i in tensors):
                yield product, users[0]


def _products(end: Node) -> Iterator[Node]:
    """Products of a floating-point tensor with the weight."""
    for product in real_users(end):
        given = isinstance(product.args[0], Node) and is_float(product.args[0])
        if op_name(product) in _PRODUCTS and len(product.args) == 2 and product.args[1] is end and given:
            yield product


def _is_shuffled(view: GraphView, ask: Probe, leaf: Node, y: Node) -> bool:
    """Are the rows of a group apart from each other? Then the product's other operand is sorted like them."""
    region = _around(view, ask, leaf, y)
    tables = () if region is None else chosen_by(region)
    values = [ask.kept.value(n) for n in tables]
    return any(v is not None and v.dim() == 1 and bool((v[1:] < v[:-1]).any()) for v in values)


def _region(view: GraphView, ask: Probe, leaf: Node, y: Node, given: Any = None) -> Region | None:
    """The region from the kept tensors, and from `given`, to y. It is cut to fewer rows, so that asking takes less;
    None if that is not possible."""
    region = _around(view, ask, leaf, y, given)
    if region is None:
        return None
    part = unpacked(region)
    fixed = tables(region) | {n for n in chosen_by(region) if ask.kept.value(n) is not None}
    kind = None if part is None else _type(ask, part)
    fits = {n: kind for n in region.others if n not in fixed and kind is not None and _fits(ask, n, kind)}
    small = smaller(region, fits, fixed, {n for n in region.nodes if cannot_wrap(n)})
    return None if small is None else replace(region, small=replace(small, words=is_packed(region)))


def _around(view: GraphView, ask: Probe, leaf: Node, y: Node, given: Any = None) -> Region | None:
    """The region around a leaf. It reads scales and zero points as they are kept, in front of repeats; those that are
    packed in words it reads where they are unpacked."""
    nodes, others, stack = set[Node](), dict[Node, None](), [y]
    while stack:
        node = stack.pop()
        if node in nodes or node is leaf or node is given:
            continue
        walked = _walked(op_name(node)) or (given is not None and op_name(node) in _PRODUCTS) or _is_counted(node)
        if walked and is_pure(node) and len(nodes) < _LIMIT and not _is_packed_beside(node, leaf):
            nodes.add(node)
            stack.extend(i for i in node.all_input_nodes if not is_size(i))
        elif tensor(node) is None or node not in ask.kept:
            return None
        else:
            others[node] = None
    inside = view.sorted(nodes)
    sources = (leaf,) if given is None else (leaf, given)
    if view.mutations and view.mutated_between([*sources, *others, *inside], view.order[inside[0]], view.order[y]):
        return None
    return Region(view, y, sources, tuple(view.sorted(others)), tuple(inside))


def _is_packed(view: GraphView, ask: Probe, leaf: Node, y: Node) -> bool:
    region = _around(view, ask, leaf, y)
    return region is not None and is_packed(region)


def _is_counted(node: Node) -> bool:
    """Is it made by counting (arange)? Such numbers say by how much words are shifted."""
    return op_name(node) == "arange" and not node.all_input_nodes


def _is_packed_beside(node: Node, leaf: Node) -> bool:
    """Is it zero points, unpacked from words of their own, in front of any repeat?"""
    if is_float(node) or op_name(node) in _REPEATS or _comes_from(node, leaf):
        return False
    stack, seen = [node], set[Node]()
    while stack:
        current = stack.pop()
        if op_name(current) in BITS:
            return True
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return False


def _type(ask: Probe, part: Unpacked) -> torch.dtype | None:
    """The type in which the operator reads the integers, and its zero points; None if they fit no type of a byte."""
    kinds = types_of(part.integers)
    chosen = chosen_by(part.after)
    whole = [n for n in part.after.others if n not in chosen and not is_float(n)]
    every = (k for k in kinds if all(fake(n).dtype == k or _fits(ask, n, k) for n in whole))
    return next(every, kinds[-1] if kinds else None)


def _fits(ask: Probe, node: Node, kind: torch.dtype) -> bool:
    """Is it known that all values it holds are integers of this narrower type?"""
    own = fake(node).dtype
    if own == kind or own == torch.bool or own.is_complex or (own.is_floating_point and not _is_taken_off(node)):
        return False
    value = ask.kept.value(node)
    if value is None or value.numel() == 0:
        return False
    info = torch.iinfo(kind)
    whole = not own.is_floating_point or bool((value == value.round()).all())
    return whole and info.min <= float(value.min()) and float(value.max()) <= info.max


def _is_taken_off(node: Node) -> bool:
    """Is this floating-point tensor subtracted from something, so that it may be zero points? Whole numbers alone do
    not tell, because a scale may hold whole numbers too."""
    users = real_users(node)
    return bool(users) and all(
        op_name(u) in ("sub", "rsub", "add")
        or (op_name(u) in DEQUANTIZES and node in _zero_points(u))
        or (op_name(u) in LAYOUT | CAST and _is_taken_off(u))
        for u in users
    )


def _zero_points(node: Node) -> list[Any]:
    """The zero points that a library's operator is given; torchao and TorchTune keep them in the type of the scales."""
    names = [a.name for a in schema_of(node.target).arguments]  # type: ignore[union-attr]
    return [a for name, a in zip(names, node.args, strict=False) if name.startswith("zero_point")]


def _shape(region: Region) -> tuple[int, ...]:
    """The shape of the weight; for a product, that of the operand that the weight is."""
    shape = tuple(fake(region.output).shape)
    return (fake(region.sources[1]).shape[-1], shape[-1]) if len(region.sources) > 1 else shape


def _form(region: Region, how: Dequantized, inside: torch.dtype) -> Form:
    """DequantizeLinear with scales of type `inside`, and the product behind it if the region has one."""
    out = fake(region.output).dtype
    ways = {fake(r.sources[0]).numel(): (r, unpacked(r), _shape(r)) for r in (region.asked, region)}

    product = len(region.sources) > 1

    def weight(x: Tensor, *others: Tensor) -> Tensor:
        whole, part, shape = ways[x.numel()]
        assert part is not None, "the region was recognised"
        read = [others[place] for place in part.places]
        y = how(part(whole, x, others), read, shape, inside, stay=product)
        return y if is_exact(read) or y.dtype == out else y.to(out)

    def multiplied(x: Tensor, a: Tensor, *others: Tensor) -> Tensor:
        _, part, _ = ways[x.numel()]
        assert part is not None, "the region was recognised"
        order = how.permutation([others[place] for place in part.places])
        a = a if order is None else a.index_select(-1, order)
        return torch.matmul(a, weight(x, *others))

    return multiplied if product else weight


def _stored(how: Dequantized, ask: Probe, region: Region) -> str:
    """The type in which the file will hold the integers, as far as it is known."""
    part = unpacked(region)
    assert part is not None, "the region was recognised"
    zeros = [region.others[part.places[p.place]] for p in how.found.zeros]
    held = [v for v in map(ask.kept.value, (part.integers, *zeros)) if v is not None and v.numel()]
    if len(held) <= len(zeros):
        return str(how.kind).removeprefix("torch.").upper()
    low, high = min(int(v.min()) for v in held), max(int(v.max()) for v in held)
    return stored_as(how.kind, min(low, how.found.zero), max(high, how.found.zero))


PATTERN = DequantizeLinear()
