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
from fxfuse.graph.view import CAST, UNSET, fake, op_name, tensor
from fxfuse.proof.analytic import MOVED, is_analytic
from fxfuse.proof.orders import EACH_PLACE, ORDERS, OTHER_NUMBERS, Order, alone
from fxfuse.proof.pieces import Call, by_slice, out_of_range, pieces_of
from fxfuse.proof.positions.claims import masks_from


@dataclass
class Break:
    """One break of a region."""

    name: str
    """Short and stable, ``"clamp@model.py:12"``: what `accept` names it by."""
    what: str
    """The operator."""
    node: Node | None = None
    """The call in the graph; None for a step of a user's example, which has no graph."""
    met: dict[tuple[str, tuple[int, ...]], Tensor] = field(default_factory=dict)
    """By piece and by the shape of its slices: which have run."""
    beyond: dict[str, str] = field(default_factory=dict)
    """Pieces that no input can reach, each with the rule that says so."""
    fill: float | None = None
    """If it is a `where` or `masked_fill` that puts one number in the place of scores: that number."""
    fill_dtype: torch.dtype | None = None
    unlike: bool = False
    """Did it order, in some draw, what nobody on the other side orders?"""

    @property
    def missing(self) -> list[str]:
        """Pieces of which a slice has not run."""
        whole = {piece for (piece, _), slices in self.met.items() if bool(slices.all())}
        whole -= {OTHER_NUMBERS} if self.unlike else set()
        return [p for p in dict.fromkeys(piece for piece, _ in self.met) if p not in whole and p not in self.beyond]


class Breaks:
    """The breaks of one region, and what ran of them in all draws so far."""

    def __init__(self, accept: frozenset[str] = frozenset()) -> None:
        self._accept = accept
        self.found: dict[Any, Break] = {}
        self._fresh: dict[Any, dict[tuple[str, tuple[int, ...]], Tensor]] = {}
        self._orders: dict[Any, Order] = {}
        """What the last draw put in order."""
        self.ran: set[tuple[str, str]] = set()
        """Of the last draw: breaks by name, and which of their pieces ran."""
        self.outside: str | None = None
        """Why the last draw lies outside the domain, if it does."""

    def start(self) -> None:
        """A new draw."""
        self.outside = None
        self.ran = set()
        self._fresh = {}
        self._orders = {}

    def record(self, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any], value: Any) -> None:
        """Note which pieces of this call ran, and whether a result lies beyond the range of its type."""
        self._overflow(node, args, value)
        if is_analytic(node):
            return
        call = Call(node, args, kwargs, value)
        filled = _as_masked_fill(call) if op_name(node) == "index_put" else None
        if filled is not None:
            self.note(node, "masked_fill", filled)
        else:
            self.note(node, op_name(node) or str(node.target), call)

    def note(self, key: Any, name: str, call: Call) -> None:
        """Note which pieces ran, for a call that is no node of a graph."""
        if name in ORDERS:
            self._order(key, name, Order(name, call))
            return
        pieces, bound = pieces_of(name, call)
        if pieces is None:
            return
        fresh = key not in self.found
        found = self._found(key, name)
        if fresh:
            found.beyond.update(out_of_range(name, call))
        if name in ("masked_fill", "where"):
            _note_fill(found, name, call)
            self._below_fill(found, name, call)
        for piece, ran in pieces.items():
            slices = by_slice(ran, bound)
            if bool(slices.any()):
                self.ran.add((found.name, piece))
            at = (piece, tuple(slices.shape))
            here = self._fresh.setdefault(key, {})
            here[at] = slices | here[at] if at in here else slices
            found.met.setdefault(at, torch.zeros_like(slices))

    def _found(self, key: Any, name: str) -> Break:
        if key not in self.found:
            where = place_of(key) if isinstance(key, Node) else None
            node = key if isinstance(key, Node) else None
            self.found[key] = Break(f"{name}@{where}" if where else name, name, node)
        return self.found[key]

    def _order(self, key: Any, name: str, order: Order) -> None:
        """Note what is put in order, and which places are picked."""
        found, places = self._found(key, name), order.places()
        self._orders[key] = order
        self._fresh.setdefault(key, {})[EACH_PLACE, tuple(places.shape)] = places
        found.met.setdefault((EACH_PLACE, tuple(places.shape)), torch.zeros_like(places))
        found.met.setdefault((OTHER_NUMBERS, ()), torch.zeros((), dtype=torch.bool))

    def _settle_orders(self) -> None:
        """Whatever the region orders the example has to order too, and the other way round."""
        region = [(key, order) for key, order in self._orders.items() if isinstance(key, Node)]
        example = [(key, order) for key, order in self._orders.items() if not isinstance(key, Node)]
        unlike = alone(region, example) | alone(example, region)
        for key in self._orders:
            self.found[key].unlike |= key in unlike
            self._fresh[key][OTHER_NUMBERS, ()] = torch.tensor(key not in unlike)

    def count(self) -> None:
        """The last draw lies in the domain: the pieces that ran in it count as met."""
        self._settle_orders()
        for key, met in self._fresh.items():
            known = self.found[key].met
            for at, slices in met.items():
                known[at] = known[at] | slices

    @property
    def missing(self) -> Iterator[tuple[Break, str]]:
        for one in self.found.values():
            for piece in one.missing:
                yield one, piece

    def _overflow(self, node: Node, args: Sequence[Any], value: Any) -> None:
        """Where eager itself overflows, the draw is outside the domain: no replacement has to keep infinities."""
        if self.outside is not None or not isinstance(value, Tensor) or not value.is_floating_point():
            return
        declared = tensor(node)
        if declared is None or not declared.dtype.is_floating_point or op_name(node) in _SINGULAR | MOVED | UNSET:
            return
        kind = torch.finfo(declared.dtype)
        largest = kind.max * (1 + kind.eps / 4)  # what rounds to infinity
        size = value.abs()
        if bool((size <= largest).all()):
            return
        operands = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        if not operands:
            return
        over = size > largest
        if not all(bool((o.abs() <= largest).all()) for o in operands):
            over = over & value.isfinite()  # a mask of infinities makes more of them without an overflow
        else:
            over = over | value.isnan()
        hidden = masks_from(declared.dtype)
        for operand in operands:  # a key that is hidden stays hidden
            if operand.dim() <= value.dim() and op_name(node) in ("add", "sub", "rsub"):
                over = over & ~((operand.expand_as(value) <= hidden) & (value < 0))
        if bool(over.any()):
            self.outside = f"{node.name} overflows {declared.dtype}"

    def _below_fill(self, found: Break, name: str, call: Call) -> None:
        """A fill as far down as -1e9 masks as long as scores lie above it: a draw in which they do not is outside the
        domain."""
        if found.fill is None or not math.isfinite(found.fill):
            return
        if not masks(found) and found.name not in self._accept:
            return
        kept = call.args[0] if name == "masked_fill" else _other(call, found.fill)
        if isinstance(kept, Tensor) and kept.is_floating_point():
            finite = kept[kept.isfinite()]
            for other in self.found.values():  # what an earlier mask filled in is not compared with this fill
                if other.fill is not None:
                    finite = finite[finite != other.fill]
            if finite.numel() and bool((finite < found.fill / 2).any()):
                self.outside = f"scores reach the fill of {found.name}"


_SINGULAR = frozenset(
    [
        "where",
        "masked_fill",
        "full",
        "full_like",
        "new_full",
        "scalar_tensor",
        "log",
        "log2",
        "log10",
        "log1p",
        "div",
        "true_divide",
        "reciprocal",
        "rsqrt",
        "divide",
        "logit",
    ]
)
"""Operators that give infinity at 0, or where their arguments say so, which is no overflow."""


def _as_masked_fill(call: Call) -> Call | None:
    """``x[:, mask] = number`` as ``x.masked_fill(mask, number)``; None where it is something else."""
    x, indices, number = call.args[:3]
    masks = [i for i in indices if i is not None]
    if len(masks) != 1 or masks[0].dtype != torch.bool or number.numel() != 1 or call.get("accumulate"):
        return None
    axis = next(n for n, i in enumerate(indices) if i is not None)
    behind = x.dim() - axis - masks[0].dim()
    mask = masks[0].reshape([1] * axis + list(masks[0].shape) + [1] * behind)
    return Call(call.node, (x, mask, number), {}, call.value)


def masks(found: Break) -> bool:
    """Does it fill in a number so far down that a key with that score gets no weight?"""
    return found.fill is not None and found.fill <= masks_from(found.fill_dtype or torch.float32)


def _note_fill(found: Break, name: str, call: Call) -> None:
    """Note it if the call puts one number, the same everywhere, in the place of what was computed."""
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


def coarse_casts(nodes: Sequence[Node], out: torch.dtype) -> Iterator[Node]:
    """Casts within a region to a type that is coarser than the result's. Their rounding is part of what the model
    computes, and a fused operator would not have it."""
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
