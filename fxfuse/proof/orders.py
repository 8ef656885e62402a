"""Calls that put numbers in order, and pick by it: topk, sort, argmax.

Each order that the numbers can be in is a piece of its own, far too many to meet. But where region and example order
the same numbers in the same way, they pick the same in every order. So the numbers that are ordered are compared, in
every draw, as results are; and draws go on until every place along the axis was picked, for what is computed of a place
(a bias of each expert) is seen only there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fxfuse.proof.pieces import Call

ORDERS = frozenset(["topk", "sort", "argsort", "argmax", "argmin"])
OTHER_NUMBERS = "ordering numbers of which nothing is known"
"""The piece that runs where nobody is known to order the same numbers."""
EACH_PLACE = "picking each place"
_ALIKE = 1e-10
"""How far the numbers may be apart, relatively: what float64 loses on the way to them."""


class Order:
    """One such call, in one draw."""

    def __init__(self, name: str, call: Call) -> None:
        self.name = name
        self.numbers: Tensor = call.args[0]
        axis = call.get("dim")
        self.axis = None if axis is None else int(axis) % max(self.numbers.dim(), 1)
        self.how = tuple(call.get(argument) for argument in ("k", "largest", "descending", "stable"))
        values = call.value
        self.picked: Tensor = values[1] if isinstance(values, (tuple, list)) else values

    def like(self, other: Order) -> bool:
        """Do both order the same numbers in the same way?"""
        mine, theirs = self.numbers, other.numbers
        same = (self.name, self.axis, self.how, mine.shape) == (other.name, other.axis, other.how, theirs.shape)
        if not same or mine.dtype != theirs.dtype:
            return False
        apart = (mine.double() - theirs.double()).abs()
        small = _ALIKE * torch.maximum(mine.double().abs(), theirs.double().abs())
        return bool(((apart <= small) | (mine == theirs) | (mine.isnan() & theirs.isnan())).all())

    def places(self) -> Tensor:
        """By place along the axis: was it picked?"""
        count = self.numbers.numel() if self.axis is None else self.numbers.shape[self.axis]
        found = torch.zeros(count, dtype=torch.bool)
        found[self.picked.reshape(-1)] = True
        return found


def alone(mine: Iterable[tuple[Any, Order]], theirs: Iterable[tuple[Any, Order]]) -> set[Any]:
    """The keys of those calls of one side that have no like among those of the other."""
    others = [order for _, order in theirs]
    return {key for key, order in mine if not any(order.like(other) for other in others)}
