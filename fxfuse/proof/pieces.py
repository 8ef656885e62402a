"""Which pieces each break has, and where each of them ran in one call."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfuse.graph.view import CAST, fake, tensor
from fxfuse.torch_seams import schema_of

Pieces = dict[str, Tensor]
"""By name, where the piece ran: boolean, of the shape of the result."""


@dataclass(frozen=True)
class Call:
    """A call with its values."""

    node: Node | None
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    value: Any
    schema: Any = None

    def get(self, name: str, position: int | None = None) -> Any:
        """An argument by its name in the schema."""
        schema = self.schema or schema_of(getattr(self.node, "target", None))
        if name in self.kwargs:
            return self.kwargs[name]
        for place, declared in enumerate(schema.arguments if schema is not None else ()):
            if declared.name == name:
                if place < len(self.args) and not declared.kwarg_only:
                    return self.args[place]
                return declared.default_value if declared.has_default_value() else None
        return None


def _tensor(value: Any, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=like.dtype)


def _bounded(x: Tensor, low: Any, high: Any) -> tuple[Pieces, Any]:
    pieces: Pieces = {}
    if low is not None:
        pieces["below"] = x < _tensor(low, x)
        pieces["above its lower bound"] = x > _tensor(low, x)
    if high is not None:
        pieces["above"] = x > _tensor(high, x)
        pieces["below its upper bound"] = x < _tensor(high, x)
    return pieces, [b for b in (low, high) if isinstance(b, Tensor) and b.dim()]


_SIGNS = frozenset(
    ["abs", "sign", "sgn", "leaky_relu", "elu", "selu", "celu", "prelu", "_prelu_kernel", "relu", "relu_"]
)
_RANGES = {"relu6": (0.0, 6.0), "hardtanh": None, "hardswish": (-3.0, 3.0), "hardsigmoid": (-3.0, 3.0)}
_ROUNDS = frozenset(["floor", "ceil", "round", "trunc", "frac", "fix"])
_COMPARES = frozenset(
    ["gt", "lt", "ge", "le", "eq", "ne", "greater", "less", "greater_equal", "less_equal", "not_equal", "isclose"]
)
_WHOLE = frozenset(
    [
        "bitwise_and",
        "bitwise_or",
        "bitwise_xor",
        "bitwise_not",
        "bitwise_left_shift",
        "bitwise_right_shift",
        "__and__",
        "__or__",
        "__xor__",
        "__lshift__",
        "__rshift__",
        "logical_and",
        "logical_or",
        "logical_xor",
        "logical_not",
    ]
)
_PICKS = frozenset(["index", "gather", "take_along_dim", "index_select", "embedding", "index_put", "index_copy"])
_SLICED = frozenset(["slice_scatter", "select_scatter", "copy"])


def pieces_of(name: str, call: Call) -> tuple[Pieces | None, Any]:
    """The pieces of a call and where each ran; and the tensors that its bound is given by. None: it has no pieces."""
    x = call.args[0] if call.args else None
    if name in CAST:
        return _cast_pieces(call)
    if name in ("clamp", "clip", "clamp_min", "clamp_max", "hardtanh") and isinstance(x, Tensor):
        names = {"hardtanh": ("min_val", "max_val")}.get(name, ("min", "max"))
        low = call.get(names[0]) if name != "clamp_max" else None
        high = call.get(names[1]) if name != "clamp_min" else None
        return _bounded(x, low, high)
    if name in _RANGES and isinstance(x, Tensor):
        return _bounded(x, *_RANGES[name])  # type: ignore[misc]
    if name in _SIGNS and isinstance(x, Tensor):
        return {"negative": x < 0, "positive": x > 0}, ()
    if name in ("hardshrink", "softshrink") and isinstance(x, Tensor):
        size = float(call.get("lambd"))
        return {"within": x.abs() < size, "above": x > size, "below": x < -size}, ()
    if name == "threshold" and isinstance(x, Tensor):
        bound = float(call.get("threshold"))
        return {"below": x < bound, "above": x > bound}, ()
    if name == "softplus" and isinstance(x, Tensor):
        scaled = x * call.get("beta")
        return {"curved": scaled < call.get("threshold"), "straight": scaled > call.get("threshold")}, ()
    if name in ("maximum", "minimum", "fmax", "fmin", "max", "min") and len(call.args) > 1 and x is not None:
        y = _tensor(call.args[1], x)
        smaller = [t for t in (x, y) if isinstance(t, Tensor) and t.numel() < call.value.numel()]
        return {"the first": (x > y).expand(call.value.shape), "the second": (x < y).expand(call.value.shape)}, smaller
    if name in ("where", "masked_fill"):
        condition = x if name == "where" else call.args[1]
        if len(call.args) < 3 or not isinstance(condition, Tensor):
            return {"a search": torch.zeros((), dtype=torch.bool)}, ()
        taken = condition.expand(call.value.shape)
        return {"true": taken, "false": ~taken}, ()
    if name in _COMPARES and isinstance(call.value, Tensor):
        smaller = [t for t in call.args[:2] if isinstance(t, Tensor) and t.dim() and t.numel() < call.value.numel()]
        return {"true": call.value, "false": ~call.value}, smaller
    if name in ("isnan", "isinf", "isfinite", "isneginf", "isposinf"):
        return {"true": call.value, "false": ~call.value}, ()
    if name == "nan_to_num" and isinstance(x, Tensor):
        return {"not a number": x.isnan(), "infinite": x.isinf()}, ()
    if name in _ROUNDS and isinstance(x, Tensor):
        return {"a fraction": x != x.trunc(), "beyond one": x.abs() >= 1, "negative": x < 0}, ()
    if name in ("quantize_per_tensor", "quantize_per_channel") and isinstance(call.value, Tensor):
        low, high = call.get("quant_min"), call.get("quant_max")
        return {"below": call.value == low, "above": call.value == high, "between": call.value != low}, ()
    if name in ("floor_divide", "remainder", "fmod", "div", "divide") and isinstance(x, Tensor):
        over = (x / _tensor(call.args[1], x)).abs()
        return {"within": over < 1, "beyond": over >= 1, "negative": x < 0}, ()
    if name in _WHOLE or name in _PICKS or name in _SLICED:
        return {}, ()  # their operand is drawn over its whole range, so that both sides are met anyway
    if name == "pow":
        return {"a power that varies": torch.zeros((), dtype=torch.bool)}, ()
    return {f"{name}, of which nothing is known": torch.zeros((), dtype=torch.bool)}, ()


def _cast_pieces(call: Call) -> tuple[Pieces | None, Any]:
    """Casts to whole numbers cut off; casts of them to a narrower type wrap or round."""
    if call.node is None:
        return None, ()
    source: Any = call.node.args[0]
    before, after = fake(source).dtype, fake(call.node).dtype
    x = call.args[0]
    if before == after or not isinstance(x, Tensor):
        return None, ()
    if after == torch.bool:
        return {"zero": x == 0, "not zero": x != 0}, ()
    if after.is_floating_point or after.is_complex:
        if before.is_floating_point or before.is_complex or before == torch.bool:
            return None, ()
        limit = exact_below(after)
        return ({"rounded": x.abs() > limit} if after in (torch.float16, torch.bfloat16) else None), ()
    if before.is_floating_point:
        return {"a fraction": x != x.trunc(), "whole": x == x.trunc(), "negative": x < 0}, ()
    if before == torch.bool or torch.iinfo(after).bits >= 32:
        return None, ()
    info = torch.iinfo(after)
    x = x.to(torch.int64)  # compared as uint8, -128 would be 128
    return {"wrapped": (x < info.min) | (x > info.max), "held": (x >= info.min) & (x <= info.max)}, ()


def exact_below(kind: torch.dtype) -> float:
    """The number up to which a floating type holds every whole number exactly."""
    return float(2.0 ** (-math.log2(torch.finfo(kind).eps) + 1))


def out_of_range(name: str, call: Call) -> dict[str, str]:
    """Pieces that no value of the operand's type can reach, each with the reason."""
    node = call.node
    if node is None or not isinstance(call.value, Tensor):
        return {}
    x = call.args[0] if call.args else None
    source = next((a for a in node.args if isinstance(a, Node) and tensor(a) is not None), None)
    dtype = None if source is None else fake(source).dtype
    if dtype is None or not dtype.is_floating_point or not isinstance(x, Tensor):
        return {}
    limit = torch.finfo(dtype).max * 0.999
    found: dict[str, str] = {}
    why = f"the bound lies at the end of {dtype}'s range"
    if name in ("clamp", "clip", "clamp_min", "clamp_max", "hardtanh"):
        names = {"hardtanh": ("min_val", "max_val")}.get(name, ("min", "max"))
        low = call.get(names[0]) if name != "clamp_max" else None
        high = call.get(names[1]) if name != "clamp_min" else None
        if low is not None and bool((_tensor(low, x) <= -limit).all()):
            found["below"] = why
        if high is not None and bool((_tensor(high, x) >= limit).all()):
            found["above"] = why
    if name in ("maximum", "minimum", "fmax", "fmin", "max", "min") and len(call.args) > 1:
        y = call.args[1]
        if isinstance(y, Tensor) and bool((y.abs() >= limit).all()):
            found["the second"] = why
    if name in ("gt", "lt", "ge", "le") and len(call.args) > 1:
        y = _tensor(call.args[1], x)
        if bool((y.abs() >= limit).all()):
            high = bool((y > 0).all())
            found["true" if high == (name in ("gt", "ge")) else "false"] = why
    return found


def by_slice(ran: Tensor, bound: Any) -> Tensor:
    """Did the piece run, for each slice along the axes that the bound varies over?"""
    if not bound or ran.dim() == 0:
        return ran.any()
    rank = ran.dim()
    kept = set()
    for b in bound:
        for axis in range(b.dim()):
            if b.shape[axis] > 1 and b.shape[axis] == ran.shape[rank - b.dim() + axis]:
                kept.add(rank - b.dim() + axis)
    others = [a for a in range(rank) if a not in kept]
    return ran if not others else ran.any(dim=others) if len(others) > 1 else ran.any(dim=others[0])
