"""Why a normalisation is no RMSNorm over the last axis: over which axes, of what, and by which size it divides."""

from __future__ import annotations

from itertools import combinations

import torch
from torch.fx import Node

from fxfuse.graph.region import real_users
from fxfuse.graph.view import CAST, LAYOUT, GraphView, argument, op_name
from fxfuse.proof.evaluate import draw, generator
from fxfuse.recognise.answers import NEAR, Reason
from fxfuse.recognise.normalisation import NormFunction
from fxfuse.recognise.walk import forward

_TOLD = 3
_STEPS = CAST | LAYOUT | frozenset(["add", "clamp", "clamp_min", "maximum", "mul", "div"])


def of_another(view: GraphView, anchor: Node) -> Reason | None:
    """What to say of a root of a mean of squares around which no normalisation was found."""
    if not _is_root_mean_square(anchor):
        return None
    after = forward(view, anchor, lambda name: name in CAST or name in LAYOUT or name in ("add", "reciprocal"), depth=4)
    scales = any(op_name(user) in ("mul", "div", "true_divide") for node in after for user in real_users(node))
    what = "it scales another one, or one that was changed since" if scales else "nothing is divided by it"
    return Reason(f"a root of a mean of squares, but the tensor that it is of is not divided by it: {what}", NEAR)


def _is_root_mean_square(anchor: Node) -> bool:
    node: Node | None = anchor
    for _ in range(8):
        node = node.all_input_nodes[0] if node is not None and node.all_input_nodes else None
        if node is None:
            return False
        if op_name(node) == "mean":
            squared = node.all_input_nodes[0]
            while op_name(squared) in CAST | LAYOUT and squared.all_input_nodes:
                squared = squared.all_input_nodes[0]
            return (
                op_name(squared) == "square"
                or (op_name(squared) == "pow" and argument(squared, "exponent") == 2)
                or (op_name(squared) == "mul" and squared.args[0] is squared.args[1])
            )
        if op_name(node) not in _STEPS:
            return False
    return False


def near_miss(f: NormFunction, x: Node) -> Reason:
    """Scale-invariant per position, so a normalisation of some kind: which property fails?"""
    values = draw(x, f.evaluator, generator(5)) * 1e4
    y, three = f(values), f(values * 3)
    if y.shape != values.shape or not torch.isfinite(y).all() or not torch.allclose(y, three, rtol=1e-5, atol=1e-9):
        return Reason("not a normalisation")
    rank = values.dim()
    for axes in (a for count in range(1, rank + 1) for a in combinations(range(rank), count)):
        if all(values.shape[a] == 1 for a in axes):
            continue
        size = values.square().mean(axes, keepdim=True).sqrt()
        if _by_weights(y * size / values, axes):
            return _over(axes, rank)
    for axes in (a for count in range(1, rank + 1) for a in combinations(range(rank), count)):
        less = values - values.mean(axes, keepdim=True)
        spread = less.square().mean(axes, keepdim=True).sqrt()
        if _by_weights(y * spread / less, axes):
            return Reason("a LayerNorm, not an RMSNorm")  # its own pattern says what is wrong with it
        if _by_weights(y * spread / values, axes):
            return Reason("it divides by the standard deviation, not by the root of the mean square", _TOLD)
    ratio = y / values
    by_position = ratio / ratio[..., :1]
    if torch.allclose(by_position, by_position.reshape(-1, values.shape[-1])[:1].expand_as(by_position), rtol=1e-6):
        return Reason(
            "RMSNorm but for one factor a position: what it divides by is not the root mean square over the last axis, "
            "or the position is scaled beside (divide first, and scale the result)",
            _TOLD,
        )
    return Reason("not a normalisation")


def _by_weights(ratio: torch.Tensor, axes: tuple[int, ...]) -> bool:
    """Does it differ along these axes alone, as a weight does?"""
    if not torch.isfinite(ratio).all():
        return False
    others = [a for a in range(ratio.dim()) if a not in axes]
    first = ratio
    for axis in others or axes:  # over everything there is one size, and what else differs is no weight
        first = first.narrow(axis, 0, 1)
    return torch.allclose(ratio, first.expand_as(ratio), rtol=1e-5)


def _over(axes: tuple[int, ...], rank: int) -> Reason:
    last = rank - 1
    if axes == (last,):
        return Reason("RMSNorm over the last axis, which has no fixed size (export it with this size fixed)", _TOLD)
    if len(axes) == 1:
        return Reason(
            f"RMSNorm over axis {axes[0]} of {rank}, and the operator takes the last: normalise "
            f"x.movedim({axes[0]}, -1) and move the result back",
            _TOLD,
        )
    return Reason(
        f"RMSNorm over axes {', '.join(map(str, axes))} together, and only the last one is looked at: "
        "bring them together in one axis first",
        _TOLD,
    )
