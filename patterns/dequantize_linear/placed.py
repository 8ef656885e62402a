"""Which element of a tensor stands at which place of another shape, as far as strides (a permute and an expand) say
it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placed:
    """How a tensor's elements are spread over a shape: its memory counts these `axes` of the shape, in this order, and
    its elements repeat along all others."""

    axes: tuple[int, ...]

    def __call__(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        """`values` spread over `shape`."""
        sizes = [shape[a] for a in self.axes]
        if list(values.shape) != sizes:
            values = values.reshape(sizes)
        order = sorted(range(len(self.axes)), key=lambda i: self.axes[i])
        if order != list(range(len(order))):
            values = values.permute(order)
        for axis in range(len(shape)):
            if axis not in self.axes:
                values = values.unsqueeze(axis)
        return values if list(values.shape) == list(shape) else values.expand(list(shape))


def placed(index: Tensor, count: int) -> Placed | None:
    """How elements 0 to count - 1 of a tensor are spread over the shape of `index`, which holds the element at each
    place.

    None if strides cannot say it, or if some elements stand nowhere.
    """
    steps = []
    for axis, size in enumerate(index.shape):
        ends = index.narrow(axis, 0, 1), index.narrow(axis, min(1, size - 1), 1)
        steps.append(int((ends[1] - ends[0]).reshape(-1)[0]))
    expected = torch.zeros_like(index)
    for axis, step in enumerate(steps):
        row = torch.arange(index.shape[axis]) * step
        expected = expected + row.reshape([-1 if a == axis else 1 for a in range(index.dim())])
    if not torch.equal(index, expected):
        return None
    axes = sorted((a for a, step in enumerate(steps) if step != 0), key=lambda a: -steps[a])
    held = 1
    for axis in reversed(axes):
        if steps[axis] != held:
            return None
        held *= index.shape[axis]
    return Placed(tuple(axes)) if held == count else None
