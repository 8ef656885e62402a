"""Tensors that only count: what a program computes of sizes alone, such as the position of every token.

transformers captures position ids [B, S] and, from their differences, which of the packed samples a token belongs to;
where nobody gives position ids they are 0, 1, 2, … and there is one sample. Read operator by operator, never measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.fx import Graph, Node

from fxfuse.graph.view import tensor
from fxfuse.proof.positions.reader import Reader, Unreadable

_readers: WeakKeyDictionary[Graph, tuple[int, Reader]] = WeakKeyDictionary()
"""One for each graph, and how many nodes that had."""


@dataclass(frozen=True)
class Counted:
    """The value at [i, j, …] is `start` + steps[0]·i + steps[1]·j + …; the step of a dim of one element is 0."""

    start: int
    steps: tuple[int, ...]

    @property
    def constant(self) -> bool:
        return not any(self.steps)


def counted(value: Any) -> Counted | None:
    """How a tensor of integers or booleans counts, where it does so for every input and at every size."""
    fake = tensor(value) if isinstance(value, Node) else None
    if fake is None or fake.dtype not in (torch.int64, torch.int32, torch.bool) or value.op != "call_function":
        return None
    reader = _reader(value.graph)
    index = reader.index(value)
    try:
        term = reader.terms.as_int(reader.read(value, index))
    except Unreadable:
        return None
    start, parts = reader.terms.linear(term)
    if any(part not in index for part in parts):
        return None
    found = Counted(start, tuple(parts.get(place, 0) for place in index))
    return None if fake.dtype == torch.bool and not (found.constant and start in (0, 1)) else found


def _reader(graph: Graph) -> Reader:
    count = len(graph.nodes)
    known = _readers.get(graph)
    if known is None or known[0] != count:
        known = _readers[graph] = (count, Reader({}, {}))
    return known[1]
