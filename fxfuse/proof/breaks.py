"""Breaks: operators that are put together of pieces, and which of the pieces ran.

A clamp is three functions: below, between and above. Region and replacement may agree on the one that ordinary numbers
run and differ on the next. So every break of a region is recorded while it is evaluated, each piece for every slice of
what the bound is given by (a head, a feature, a row), and the proof goes on drawing until all of them have run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfuse.graph.source import place_of
from fxfuse.graph.view import CAST, fake, op_name, tensor
from fxfuse.proof.analytic import is_analytic

Pieces = dict[str, Tensor]
"""By name, where the piece ran: boolean, of the shape of the result."""


@dataclass
class Break:
    """One break of a region."""

    name: str
    """Short and stable, ``"clamp@model.py:12"``: what `accept` names it by."""
    what: str
    """The operator."""
    node: Node | None = None
    """None for a step of an example."""
    met: dict[tuple[str, tuple[int, ...]], Tensor] = field(default_factory=dict)
    """By piece and by the shape of its slices: which have run."""
    beyond: dict[str, str] = field(default_factory=dict)
    """Pieces that nothing can reach, and why."""
    fill: float | None = None
    """The number that it puts in the place of scores, if it does."""
    fill_dtype: torch.dtype | None = None

    @property
    def missing(self) -> list[str]:
        """Pieces of which a slice has not run."""
        whole = {piece for (piece, _), slices in self.met.items() if bool(slices.all())}
        return [p for p in dict.fromkeys(piece for piece, _ in self.met) if p not in whole and p not in self.beyond]


class Breaks:
    """The breaks of one region, and what ran of them in all draws so far."""

    def __init__(self, accept: frozenset[str] = frozenset()) -> None:
        self._accept = accept
        self.found: dict[Any, Break] = {}
        self.ran: set[tuple[str, str]] = set()
        """Of the last draw: breaks by name, and which of their pieces ran."""
        self.outside: str | None = None
        """Why the last draw lies outside the domain, if it does."""

    def start(self) -> None:
        """A new draw."""
        self.outside = None
        self.ran = set()

    def record(self, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any], value: Any) -> None:
        """Note what ran of this call, and whether it left the range of its type."""
        self._overflow(node, args, value)
        if is_analytic(node):
            return
        self.note(node, op_name(node) or str(node.target), Call(node, args, kwargs, value))

    def note(self, key: Any, name: str, call: Call) -> None:
        """The same for a call that is no node."""
        pieces, bound = _pieces(name, call)
        if pieces is None:
            return
        found = self.found.get(key)
        if found is None:
            where = place_of(key) if isinstance(key, Node) else None
            found = self.found[key] = Break(
                f"{name}@{where}" if where else name, name, key if isinstance(key, Node) else None
            )
            found.beyond.update(_beyond(name, call))
        if name in ("masked_fill", "where"):
            _note_fill(found, name, call)
            self._below_fill(found, name, call)
        for piece, ran in pieces.items():
            slices = _slices(ran, bound)
            if bool(slices.any()):
                self.ran.add((found.name, piece))
            at = (piece, tuple(slices.shape))
            found.met[at] = slices | found.met[at] if at in found.met else slices

    @property
    def missing(self) -> Iterator[tuple[Break, str]]:
        for one in self.found.values():
            for piece in one.missing:
                yield one, piece

    def _overflow(self, node: Node, args: Sequence[Any], value: Any) -> None:
        """What eager computes beyond the range of its own type is nothing to keep."""
        if self.outside is not None or not isinstance(value, Tensor) or not value.is_floating_point():
            return
        declared = tensor(node)
        if declared is None or not declared.dtype.is_floating_point or op_name(node) in _SINGULAR:
            return
        largest = torch.finfo(declared.dtype).max
        size = value.abs()
        if bool((size <= largest).all()):
            return
        operands = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        if not operands:
            return
        over = size > largest
        if not all(bool((o.abs() <= largest).all()) for o in operands):
            over = over & value.isfinite()  # of what is infinite already (a mask), infinity is no overflow
        else:
            over = over | value.isnan()
        if bool(over.any()):
            self.outside = f"{node.name} overflows {declared.dtype}"

    def _below_fill(self, found: Break, name: str, call: Call) -> None:
        """A fill far down masks, for scores above it."""
        if found.fill is None or not math.isfinite(found.fill):
            return
        if not masks(found) and found.name not in self._accept:
            return
        kept = call.args[0] if name == "masked_fill" else _other(call, found.fill)
        if isinstance(kept, Tensor) and kept.is_floating_point():
            finite = kept[kept.isfinite()]
            for other in self.found.values():  # what was hidden before is no score
                if other.fill is not None:
                    finite = finite[finite != other.fill]
            if finite.numel() and bool((finite < found.fill / 2).any()):
                self.outside = f"scores reach the fill of {found.name}"


_SINGULAR = frozenset(["where", "masked_fill", "log", "log2", "log10", "log1p", "div", "true_divide", "reciprocal", "rsqrt", "divide", "logit"])
"""They give infinity at 0, or where they are told to, without an overflow."""


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
        schema = self.schema or getattr(getattr(self.node, "target", None), "_schema", None)
        if name in self.kwargs:
            return self.kwargs[name]
        for place, declared in enumerate(schema.arguments if schema is not None else ()):
            if declared.name == name:
                if place < len(self.args) and not declared.kwarg_only:
                    return self.args[place]
                return declared.default_value if declared.has_default_value() else None
        return None


def masks(found: Break) -> bool:
    """Is its fill so far down that it hides a key?"""
    from fxfuse.proof.claims import masks_from

    return found.fill is not None and found.fill <= masks_from(found.fill_dtype or torch.float32)


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


def _pieces(name: str, call: Call) -> tuple[Pieces | None, Any]:
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
    if name in ("floor_divide", "remainder", "fmod", "div", "divide") and isinstance(x, Tensor):
        over = (x / _tensor(call.args[1], x)).abs()
        return {"within": over < 1, "beyond": over >= 1, "negative": x < 0}, ()
    if name in _WHOLE or name in _PICKS or name in _SLICED:
        return {}, ()  # what they are of is drawn over its whole range
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
        limit = 2.0 ** (-math.log2(torch.finfo(after).eps) + 1)
        return ({"rounded": x.abs() > limit} if after in (torch.float16, torch.bfloat16) else None), ()
    if before.is_floating_point:
        return {"a fraction": x != x.trunc(), "whole": x == x.trunc(), "negative": x < 0}, ()
    if before == torch.bool or torch.iinfo(after).bits >= 32:
        return None, ()
    info = torch.iinfo(after)
    return {"wrapped": (x < info.min) | (x > info.max), "held": (x >= info.min) & (x <= info.max)}, ()


def _beyond(name: str, call: Call) -> dict[str, str]:
    """Pieces that lie outside the range of the type that is worked in."""
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


FINITE = "inputs are finite, and what is computed of them does not overflow"


_FINITE_ASKED = frozenset(["isnan", "isinf", "isposinf", "isneginf"])
_EITHER = frozenset(["logical_or", "bitwise_or", "__or__", "any"])


def _asks_whether_finite(condition: Any) -> bool:
    """Is the condition that something is infinite or not a number?"""
    if not isinstance(condition, Node):
        return False
    if op_name(condition) in _EITHER:
        return all(_asks_whether_finite(i) for i in condition.all_input_nodes)
    return op_name(condition) in _FINITE_ASKED


def unreachable(one: Break, piece: str) -> str | None:
    """Why a piece that never ran cannot run, by a named rule; None where no rule says so."""
    condition = {"where": 0, "masked_fill": 1}.get(one.what) if piece == "true" and one.node is not None else None
    if condition is not None and one.node is not None and _asks_whether_finite(one.node.args[condition]):
        return FINITE
    if one.what in ("isnan", "isinf", "isposinf", "isneginf") and piece == "true":
        return FINITE
    if one.what == "isfinite" and piece == "false":
        return FINITE
    if one.what == "nan_to_num":
        return FINITE
    return None


def _note_fill(found: Break, name: str, call: Call) -> None:
    """A number, the same for all, that takes the place of what was computed."""
    candidates = [call.args[2]] if name == "masked_fill" else list(call.args[1:3])
    for value in candidates:
        if isinstance(value, Tensor) and value.numel() and value.is_floating_point():
            flat = value.reshape(-1)
            held = float(flat[0]) if bool((flat == flat[0]).all()) and value.numel() == 1 else None
        else:
            held = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
        if held is not None and held < 0:
            found.fill = held
            declared = tensor(call.node) if call.node is not None else None
            found.fill_dtype = None if declared is None else declared.dtype


def _other(call: Call, fill: float) -> Any:
    """The branch of a `where` that is not the fill."""
    for value in call.args[1:3]:
        if isinstance(value, Tensor) and value.numel() > 1:
            return value
    return None


def _slices(ran: Tensor, bound: Any) -> Tensor:
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


def coarse_casts(nodes: Sequence[Node], out: torch.dtype) -> Iterator[Node]:
    """Casts inside that round more coarsely than the result: they are part of what is computed."""
    if not out.is_floating_point:
        return
    for node in nodes:
        if op_name(node) not in CAST:
            continue
        source: Any = node.args[0]
        before, after = fake(source).dtype, fake(node).dtype
        if before.is_floating_point and after.is_floating_point and before != after:
            rounds = torch.finfo(after).eps > torch.finfo(out).eps
            narrower = (
                torch.finfo(after).max < torch.finfo(out).max and torch.finfo(before).max > torch.finfo(after).max
            )
            if rounds or narrower:
                yield node
