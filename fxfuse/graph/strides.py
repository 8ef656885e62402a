"""Layouts in memory that later views need.

A replacement computes the same elements, but may lay them out otherwise: an Attention gives its result contiguous,
where the region ended in a transpose that was copied. A `view` further on that only fits the old layout would fail when
the program runs. There a copy brings the old layout back; in ONNX, which knows no strides, it is nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.fx import Node

from fxfuse.graph.emit import Emitter, value_of
from fxfuse.graph.view import ARITHMETIC, ASSERTIONS, CAST, LAYOUT, NO_OP, fake, op_name, size_text, tensor

_PASS_ON = LAYOUT | CAST | ARITHMETIC | NO_OP
"""Operators whose result is laid out as what they read."""
_LIMIT = 64


def laid_out_as(old: Node, new: Node, within: Collection[Node]) -> list[Node]:
    """The calls, put behind `new`, that lay it out as `old` is; none where what reads `old` runs on `new` as it is.

    Args:
        within: nodes that go on reading `old`.
    """
    if _strides(fake(old)) == _strides(fake(new)) or _fits(old, fake(new), within):
        return []
    strides = [_size(s) for s in fake(old).stride()]
    order = sorted(range(len(strides)), key=lambda axis: -strides[axis])
    turned = order != sorted(order)
    emitter = Emitter(new)
    copy = emitter.call(torch.ops.aten.permute.default, new, order) if turned else new
    copy = emitter.call(torch.ops.aten.clone.default, copy, memory_format=torch.contiguous_format)
    if turned:
        emitter.call(torch.ops.aten.permute.default, copy, [order.index(axis) for axis in range(len(order))])
    return emitter.added


def _fits(old: Node, value: torch.Tensor, within: Collection[Node]) -> bool:
    """Do the views that are made of `old`, and of what is computed of it element by element, run on `value` too?"""
    known: dict[Node, Any] = {old: value}
    pending = {u for u in old.users if u not in within}
    node = old
    for _ in range(_LIMIT * 8):
        node = node.next
        if not pending or node.op == "output" or len(known) > _LIMIT:
            break
        if node not in pending:
            continue
        pending.discard(node)
        if op_name(node) in ASSERTIONS or op_name(node) not in _PASS_ON or tensor(node) is None:
            continue
        try:
            result = value_of(node, known)
        except Exception:  # a view that does not fit, or one of which only a guard could tell
            return False
        if isinstance(result, torch.Tensor) and _strides(result) != _strides(fake(node)):
            known[node] = result
            pending.update(node.users)
    return True


def _strides(value: torch.Tensor) -> tuple[str, ...]:
    return tuple(map(size_text, value.stride()))


def _size(stride: Any) -> int:
    """A stride of the sample: only their order counts."""
    if isinstance(stride, torch.SymInt):
        hint = stride.node.hint
        return hint if isinstance(hint, int) else 1
    return int(stride)
