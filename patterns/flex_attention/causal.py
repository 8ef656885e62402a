"""Which conditions are q >= kv, or bounds of q - kv, however they are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxfuse.patterns.flex_attention.expression import Expr

_ORDER = {"ge": (1, 0), "gt": (1, 1), "le": (-1, 0), "lt": (-1, 1), "greater_equal": (1, 0), "greater": (1, 1)}
_ORDER |= {"less_equal": (-1, 0), "less": (-1, 1)}
_INTEGER = (torch.int32, torch.int64)


def without_causal(conditions: Sequence[Expr]) -> tuple[bool, tuple[Expr, ...]]:
    """Is one of the conditions the causal one? And the others, each once."""
    rest = tuple(dict.fromkeys(c for c in conditions if at_least(c) != 0))
    return any(at_least(c) == 0 for c in conditions), rest


def without_windows(conditions: Sequence[Expr]) -> tuple[int, int, tuple[Expr, ...]]:
    """The largest q - kv and kv - q that the conditions let through, -1 for any; and the conditions that are no such
    bound, or one that no window has: a window holds the query's own position."""
    bounds = {condition: _distance(condition) for condition in conditions}
    windows = [bound for bound in bounds.values() if bound is not None]
    left, right = (min((n for name, n in windows if name == side), default=-1) for side in ("left", "right"))
    return left, right, tuple(c for c, bound in bounds.items() if bound is None)


def _distance(condition: Expr) -> tuple[str, int] | None:
    bound = _either_way(condition)
    if bound is None or bound[1] > 0:
        return None
    terms, number = bound
    if terms == {"q": -1, "kv": 1}:
        return "left", -number
    return ("right", -number) if terms == {"q": 1, "kv": -1} else None


def at_least(condition: Expr) -> int | None:
    """The n with condition = (q - kv >= n), or None."""
    bound = _either_way(condition)
    return bound[1] if bound is not None and bound[0] == {"q": 1, "kv": -1} else None


def _either_way(condition: Expr) -> tuple[dict[str, int], int] | None:
    """The condition, or the one that it negates, as (sum of indices >= n)."""
    if condition.name in ("logical_not", "bitwise_not") and condition.args[0].dtype == torch.bool:
        # not (d >= n) is -d >= 1 - n.
        bound = _bound(condition.args[0])
        return None if bound is None else ({k: -c for k, c in bound[0].items()}, 1 - bound[1])
    return _bound(condition)


def _bound(condition: Expr) -> tuple[dict[str, int], int] | None:
    """The condition as (sum of indices >= n)."""
    if condition.name not in _ORDER:
        return None
    sign, strict = _ORDER[condition.name]
    left, right = _linear(condition.args[0]), _linear(condition.args[1])
    if left is None or right is None:
        return None
    terms = {k: sign * (left.get(k, 0) - right.get(k, 0)) for k in left | right}
    number = -terms.pop("", 0) + strict
    return {k: c for k, c in terms.items() if c}, number


def _linear(arg: Any) -> dict[str, int] | None:
    """Coefficients of the indices, and of ``""`` for the number; None where it is no sum of them."""
    if isinstance(arg, (bool, float)):
        return None
    if isinstance(arg, int):
        return {"": arg}
    if not isinstance(arg, Expr) or arg.dtype not in _INTEGER:
        return None
    if arg.leaf in ("q", "kv"):
        return {arg.leaf: 1}
    if arg.number is not None:
        return {"": int(arg.number)}
    if arg.name in ("add", "sub") and not arg.kwargs and len(arg.args) == 2:
        x, y = map(_linear, arg.args)
        if x is None or y is None:
            return None
        sign = 1 if arg.name == "add" else -1
        return {k: x.get(k, 0) + sign * y.get(k, 0) for k in x | y}
    if arg.name == "neg":
        x = _linear(arg.args[0])
        return None if x is None else {k: -c for k, c in x.items()}
    return None
