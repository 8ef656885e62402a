"""Caches of a fixed length: new entries written into a buffer [B, heads, T, head_dim], in place.

The buffers are inputs and outputs here, as in an ONNX graph, for that is where TensorScatter is of use.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.golden.case import Case

HEADS, SIZE, T = 2, 8, 12


class Cache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(2, HEADS, T, SIZE), persistent=False)


class ByIndex(Cache):
    """Slots `start`, `start` + 1, … of the buffer are written by `index_copy_`: one TensorScatter from `start` on."""

    def forward(self, new: Tensor, start: Tensor) -> Tensor:
        self.cache.index_copy_(2, torch.arange(new.shape[2]) + start, new)
        return self.cache * 1.0


class ByAssignment(Cache):
    """The same by an assignment, which `torch.export` writes as `index_put_`."""

    def forward(self, new: Tensor, start: Tensor) -> Tensor:
        self.cache[:, :, torch.arange(new.shape[2]) + start] = new
        return self.cache * 1.0


class BySlice(Cache):
    """Slots 3 and 4, by a slice that is written in the code: the first slot is a constant."""

    def forward(self, new: Tensor, start: Tensor) -> Tensor:
        self.cache[:, :, 3:5].copy_(new)
        return self.cache * 1.0


class EveryOther(Cache):
    """Every other slot is written: TensorScatter cannot say that. The write stays as it is, and the report says why."""

    def forward(self, new: Tensor, start: Tensor) -> Tensor:
        self.cache.index_copy_(2, 2 * torch.arange(new.shape[2]) + start, new)
        return self.cache * 1.0


NEW, START = torch.randn(2, HEADS, 3, SIZE), torch.tensor(1)
CASES = {
    "by_index": Case(ByIndex(), (NEW, START), ({2: "S"}, {}), lifted=True),
    "by_assignment": Case(ByAssignment(), (NEW, START), ({2: "S"}, {}), lifted=True),
    "by_slice": Case(BySlice(), (NEW[:, :, :2], START), ({}, {}), lifted=True),
    "every_other": Case(EveryOther(), (NEW, START), ({2: "S"}, {}), lifted=True),
}
