"""How many of the integers share a scale and a zero point: all of them, a row, or a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxfuse.recognise.answers import NEAR, Reason


@dataclass(frozen=True)
class Blocks:
    """As DequantizeLinear has it: one number for all (`axis` None), one for each entry of `axis` (`size` 0), or one for
    each `size` entries along `axis`, which may be all of them, however many (`whole`)."""

    axis: int | None
    size: int = 0
    whole: bool = False

    def size_of(self, shape: Sequence[int]) -> int:
        """DequantizeLinear's block_size, for integers of this shape."""
        return shape[self.axis] if self.whole and self.axis is not None else self.size

    def shape(self, shape: Sequence[int]) -> list[int]:
        """The shape of the scales for integers of this shape."""
        if self.axis is None:
            return []
        if not self.size:
            return [shape[self.axis]]
        return [-(-s // self.size_of(shape)) if a == self.axis else s for a, s in enumerate(shape)]

    def first(self, index: Tensor) -> Tensor:
        """The first element of each block; all of a block are equal."""
        if self.axis is None:
            return index.reshape(-1)[0]
        if not self.size:
            return index.movedim(self.axis, 0).reshape(index.shape[self.axis], -1)[:, 0]
        return index.index_select(self.axis, torch.arange(0, index.shape[self.axis], self.size))


def blocks(indices: Sequence[Tensor], shape: Sequence[int]) -> Blocks | Reason:
    """The coarsest blocks within which every index is the same number.

    A row of a matrix is one block of its whole length rather than an entry of the other axis: ONNX Runtime (1.32)
    turns the latter, before a MatMul, into a product with activations rounded to 8 bits, which the model does not do
    (`session.qdq_matmulnbits_accuracy_level`).
    """
    runs = [_longest_run(indices, axis, size) for axis, size in enumerate(shape)]
    varies = [axis for axis, run in enumerate(runs) if run < shape[axis]]
    if not varies:
        return Blocks(None)
    if len(shape) != 2 and len(varies) == 1 and runs[varies[0]] == 1:
        return Blocks(varies[0])
    axis = max(range(len(shape)), key=lambda a: (runs[a] > 1, runs[a] < shape[a], a))
    if runs[axis] == 1:
        return Reason("every one of its integers has a scale of its own", NEAR)
    return Blocks(axis, runs[axis], whole=runs[axis] == shape[axis])


def _longest_run(indices: Sequence[Tensor], axis: int, size: int) -> int:
    """The length of the longest blocks within which every index is one number; the last block may be shorter."""
    first = min((_first_change(index, axis) for index in indices), default=size)
    return next((run for run in range(first, 1, -1) if all(_alike(index, axis, run) for index in indices)), 1)


def _first_change(index: Tensor, axis: int) -> int:
    """The first entry of the axis that is not like the one at 0; the axis's size if there is none."""
    unlike = (index != index.narrow(axis, 0, 1)).movedim(axis, 0).reshape(index.shape[axis], -1).any(1)
    return int(unlike.to(torch.int8).argmax()) if bool(unlike.any()) else len(unlike)


def _alike(index: Tensor, axis: int, run: int) -> bool:
    starts = torch.arange(index.shape[axis]) // run * run
    return bool(torch.equal(index, index.index_select(axis, starts)))
