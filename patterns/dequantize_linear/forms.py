"""The answers about stored integers as inputs of DequantizeLinear: blocks, and scales and zero points in their
places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.fx import Node

from fxfuse.graph.region import Region
from fxfuse.graph.view import fake
from fxfuse.patterns.dequantize_linear.blocks import Blocks, blocks
from fxfuse.patterns.dequantize_linear.placed import Placed, placed
from fxfuse.patterns.dequantize_linear.scaled_integers import Part, ScaledIntegers
from fxfuse.recognise.answers import NEAR, Reason


@dataclass(frozen=True)
class Grouped:
    """Rows of one group do not stand next to each other, as with GPTQ's act-order: they are sorted by their groups."""

    place: int
    """The place in `Region.others` of the table that gives the group of each row."""
    axis: int
    """The axis of the rows, of the integers as they lie in memory."""


@dataclass(frozen=True)
class Dequantized:
    """(x - zero point) · scale, computed over the integers as they lie in memory; the result is permuted afterwards."""

    found: ScaledIntegers
    order: tuple[int, ...]
    """The axes of the result in the order of memory."""
    blocks: Blocks
    parts: dict[int, Placed]
    """For each scale and zero point, by its place in `Region.others`, which of its elements belongs to which block."""
    kind: torch.dtype
    """The type that the operator takes the integers in."""
    grouped: Grouped | None = None
    """None if the rows of each group stand next to each other already."""

    def permutation(self, others: Sequence[Tensor]) -> Tensor | None:
        """The numbers of the rows, sorted by their groups; None if they are sorted already."""
        if self.grouped is None:
            return None
        return torch.sort(others[self.grouped.place].to(torch.int64), stable=True).indices

    def __call__(
        self, x: Tensor, others: Sequence[Tensor], shape: Sequence[int], inside: torch.dtype, *, stay: bool = False
    ) -> Tensor:
        """The result, of this shape.

        Args:
            inside: the type of the scale and of the result; float64 if the inputs are, as in a proof.
            stay: if rows were sorted by their groups, does the result stay sorted?
        """
        laid_out = [shape[a] for a in self.order]
        cut = self.blocks.shape(laid_out)
        scale = self._scale(others, cut, inside, x.device)
        if not is_exact(others):
            scale = scale.to(inside)
        x = x if x.dtype == self.kind else x.to(self.kind)
        x = x if list(x.shape) == laid_out else x.reshape(laid_out)
        axis = self.blocks.axis
        order = self.permutation(others)
        if self.grouped is not None and order is not None:
            x = x.index_select(self.grouped.axis, order)
        given = {} if axis is None else {"axis": axis, "block_size": self.blocks.size_of(laid_out)}
        y: Tensor = torch.ops.fxfuse.dequantize_linear(x, scale, self._zero(others, cut, x.device), **given)
        if self.grouped is not None and order is not None and not stay:
            y = y.index_select(self.grouped.axis, torch.sort(order).indices)
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return y if back == list(range(len(back))) else y.permute(back)

    def scale_types(self, others: Sequence[Node]) -> list[torch.dtype]:
        """The floating-point types that the scales are kept in."""
        kinds = [fake(others[p.place]).dtype for p in self.found.scales]
        return list(dict.fromkeys(k for k in kinds if k.is_floating_point))

    def _scale(self, others: Sequence[Tensor], cut: list[int], inside: torch.dtype, device: torch.device) -> Tensor:
        scale: Tensor | None = None
        for part in self.found.scales:
            value = self._place(part, others, cut)
            value = value if value.is_floating_point() else value.to(torch.float64 if is_exact(others) else inside)
            value = value if part.sign > 0 else value.reciprocal()
            scale = value if scale is None else scale * value
        factor = self.found.factor
        if scale is None:
            return torch.full(cut, factor, dtype=torch.float64 if is_exact(others) else inside, device=device)
        return scale if factor == 1.0 else scale * factor

    def _zero(self, others: Sequence[Tensor], cut: list[int], device: torch.device) -> Tensor | None:
        total: Tensor | None = None
        for part in self.found.zeros:
            value = self._place(part, others, cut)
            value = value if part.sign > 0 else -value.to(torch.int32)
            total = value if total is None else total.to(torch.int32) + value
        zero = self.found.zero
        if total is None:
            return None if zero == 0 else torch.full(cut, zero, dtype=self.kind, device=device)
        total = total.to(torch.int32) + zero if zero else total
        return total if total.dtype == self.kind else total.to(self.kind)

    def _place(self, part: Part, others: Sequence[Tensor], cut: list[int]) -> Tensor:
        return self.parts[part.place](others[part.place], cut)


def is_exact(others: Sequence[Tensor]) -> bool:
    """Are these float64? A proof evaluates the form so."""
    return any(t.dtype == torch.float64 for t in others)


def dequantized(
    found: ScaledIntegers, region: Region, kind: torch.dtype, groups: Mapping[int, Tensor] = MappingProxyType({})
) -> Dequantized | Reason:
    """The inputs of DequantizeLinear for these answers; a reason if blocks along one axis and views cannot express
    them.

    Args:
        groups: by their place in `Region.others`, tables that give the group of each row.
    """
    info = torch.iinfo(kind)
    if not info.min <= found.zero <= info.max:
        return Reason(f"its zero point is {found.zero}, and {kind} does not hold it", NEAR)
    x = placed(found.index, fake(region.sources[0]).numel())
    if x is None:
        return Reason("its integers are put in an order that no view of them has", NEAR)
    rank = found.index.dim()
    order = [a for a in range(rank) if a not in x.axes] + list(x.axes)
    shape = [found.index.shape[a] for a in order]
    indices = {p.place: p.index.permute(order) for p in (*found.scales, *found.zeros)}
    cut, grouped = blocks(list(indices.values()), shape), None
    if isinstance(cut, Reason):
        for place, axis in ((p, a) for p, table in groups.items() for a in range(rank) if [shape[a]] == [*table.shape]):
            together = torch.sort(groups[place], stable=True).indices
            moved = {p: index.index_select(axis, together) for p, index in indices.items()}
            if isinstance(again := blocks(list(moved.values()), shape), Blocks):
                cut, grouped, indices = again, Grouped(place, axis), moved
                break
    if isinstance(cut, Reason):
        return cut
    parts = {}
    for place, index in indices.items():
        lies = placed(cut.first(index), fake(region.others[place]).numel())
        if lies is None:
            return Reason("its scales or zero points lie in blocks along two axes, or in an order of their own", NEAR)
        parts[place] = lies
    return Dequantized(found, tuple(order), cut, parts, kind, grouped)
