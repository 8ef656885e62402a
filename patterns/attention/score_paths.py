"""Where each score goes between the two products.

The scores are numbered, and the numbers follow them through calls that move elements or change each by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from fxfuse.graph.region import Region
from fxfuse.graph.source import place_of
from fxfuse.graph.view import ARITHMETIC, CAST, LAYOUT, NO_OP, argument, op_name, tensor
from fxfuse.patterns.attention.contraction import Product
from fxfuse.proof.evaluate import CannotEvaluate, Evaluator
from fxfuse.recognise.answers import Reason

SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
ELEMENTWISE = frozenset(
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
        "index_put",
    ]
)
PADS = frozenset({"pad", "constant_pad_nd"})
_EACH = ARITHMETIC | CAST | NO_OP | ELEMENTWISE | SOFTMAX | {"log_softmax", "nan_to_num", "where", "sub", "true_divide"}
_NONE = 0.0
"""The number given to elements that are no score; scores are counted from 1."""


@dataclass(frozen=True)
class Target:
    """A shape that the scores take on the way, which masks broadcast against."""

    shape: tuple[int, ...]
    places: torch.Tensor
    """``[N, S, T]``: where in this shape each score is, by number."""


@dataclass(frozen=True)
class Followed:
    """The scores ``[N, S, T]`` of the first product, as the second product has them."""

    shape: tuple[int, int, int]
    matrices: torch.Tensor
    """Which matrix of the second product each matrix of the first becomes."""
    targets: tuple[Target, ...]


def follow(way: Region, scores: Product, weighted: Product, evaluator: Evaluator) -> Followed | Reason:
    """Follow the scores from the first product to the weights. A reason if one does not become one weight of its
    row."""
    raw = evaluator.sizes.shape(scores.node)
    count = math.prod(raw)
    arranged = scores.result(torch.arange(count).reshape(raw))
    matrices, rows, columns = math.prod(arranged.shape[:-2]), arranged.shape[-2], arranged.shape[-1]
    numbers = torch.empty(count, dtype=torch.float64)
    numbers[arranged.reshape(-1)] = torch.arange(1, count + 1, dtype=torch.float64)
    env: dict[Node, Any] = {scores.node: numbers.reshape(raw)}
    mixing: Node | None = None
    for node in way.nodes:
        carriers = [i for i in node.all_input_nodes if i in env]
        if not carriers:
            continue
        found = _moved(node, carriers, env, evaluator)
        if found is not None:
            env[node] = found
        elif op_name(node) in ("matmul", "bmm", "einsum", "linear", "cumsum", "conv2d"):
            mixing = node
    weights = env.get(weighted.left)
    if weights is None or (weights == _NONE).any():
        what = f" ({op_name(mixing)}@{place_of(mixing)})" if mixing is not None else ""
        return Reason(f"softmax attention, but the scores of different heads or positions are mixed{what}", 3)
    arrived = weighted.rows(weights).long() - 1
    arrived = arrived.reshape(-1, *arrived.shape[-2:])
    if arrived.numel() != count:
        return Reason("softmax attention, but its weights are not one for each score", 3)
    order = arrived[:, 0, 0] // (rows * columns)
    expected = torch.arange(count).reshape(matrices, rows, columns)
    if arrived.shape != expected.shape or not torch.equal(arrived, expected[order]):
        return Reason("softmax of a product, but the second product sums over another axis of it than the keys", 1)
    targets: list[Target] = []
    for node in (scores.node, *way.nodes):
        value = env.get(node)
        if isinstance(value, torch.Tensor) and value.numel() == count and (value != _NONE).all():
            places = torch.empty(count, dtype=torch.int64)
            places[value.reshape(-1).long() - 1] = torch.arange(count)
            target = Target(tuple(value.shape), places.reshape(matrices, rows, columns))
            if not any(t.shape == target.shape and torch.equal(t.places, target.places) for t in targets):
                targets.append(target)
    return Followed((matrices, rows, columns), torch.argsort(order), tuple(targets))


def _moved(node: Node, carriers: Sequence[Node], env: dict[Node, Any], evaluator: Evaluator) -> Any:
    """The numbers behind this node; None where it is not known to keep them."""
    name = op_name(node)
    if name in PADS:
        return F.pad(env[carriers[0]], [int(evaluator.sizes(_size(p))) for p in argument(node, "pad")], value=_NONE)
    if name in LAYOUT:
        fills = {i: torch.full(evaluator.sizes.shape(i), _NONE) for i in node.all_input_nodes if _fills(i, env)}
        try:
            return evaluator.run([node], {**env, **fills})[node]
        except CannotEvaluate:
            return None
    value = tensor(node)
    if name in _EACH and value is not None:
        shape = evaluator.sizes.shape(node)
        return next((env[i] for i in carriers if getattr(env[i], "shape", None) == torch.Size(shape)), None)
    return None


def _fills(node: Node, env: dict[Node, Any]) -> bool:
    value = tensor(node)
    return node not in env and value is not None and value.dtype.is_floating_point


def _size(value: Any) -> Any:
    return value.meta["val"] if isinstance(value, Node) else value
