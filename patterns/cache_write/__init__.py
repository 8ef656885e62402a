"""A static cache: new keys written into a buffer at consecutive slots, as TensorScatter.

Source: https://onnx.ai/onnx/operators/onnx__TensorScatter.html

    buffer ────────────────────┐
    new ───────────────────────┼─ index_copy, index_put, slice_scatter ── buffer after the write
    start ─ + arange ─ index ──┘

The proof asks whether slot `start + i` of the result is the new entry i, and every other slot the buffer's, whatever
`start` is. That is why the region begins at the one number that the slots are counted from. Slots that an input gives
one by one may be any slots, so such a write stays as it is.

Writes in place are found only after the program was lifted (`fxfuse.state.lift`), which `fxfuse.onnx.export` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from fxfuse.graph.region import Region, between
from fxfuse.graph.view import CAST, LAYOUT, GraphView, argument, fake, op_name, tensor
from fxfuse.proof.sizes import Sizes
from fxfuse.recognise.answers import Form, Found, Proposal, Reason
from fxfuse.recognise.probe import Probe

_COUNTED = frozenset(["add", "arange", "alias", "clone"]) | CAST
"""Calls that count slots up from one number."""


class CacheWrite:
    """New entries written into a buffer, at slots that follow one another."""

    name = "cache_write"
    operator = "TensorScatter"
    since_opset = 24
    after = ("kv_cache",)

    def propose(self, view: GraphView, ask: Probe) -> Iterator[Proposal]:
        for node in view.nodes:
            write = _write(node)
            if write is None:
                continue
            past, new, slots, _ = write
            if not isinstance(slots, Node) or tensor(slots) is None:
                region = between(view, node, [past, new], lambda _: True)
            else:
                start = _start(slots)
                if start is None:
                    why = Reason("a cache write, but nothing says that its slots follow one another", 2)
                    yield Proposal(node, (), missed=why)
                    continue
                region = between(view, node, [past, new, start], lambda _: True)
            if region is not None:
                region = replace(region, integers_below=partial(_starts, past, new))
            yield Proposal(node, () if region is None else (region,), best_rank=0)

    def recognise(self, region: Region, ask: Probe) -> Found | Reason:
        write = _write(region.output)
        assert write is not None, "a region is proposed around a write"
        past, new, slots, axis = write
        if fake(new).dtype != fake(past).dtype:
            return Reason("a cache write, but what is written is cast to the buffer's type", 2)
        if axis == 0:
            return Reason("a cache write, but along the first axis, which is the batch to TensorScatter", 2)
        parameters = {"axis": axis, "slots": [str(size) for size in region.view.shape(past)][axis]}
        return Found(self.operator, parameters, (_form(axis, slots if len(region.sources) == 2 else None),))


def _starts(past: Node, new: Node, sizes: Sizes) -> int:
    """How many slots a write may begin at so that all new entries still fit into the buffer."""
    rank = fake(past).dim()
    held, written = sizes.shape(past), sizes.shape(new)
    written = (*held[: rank - len(written)], *written)
    return max(1, min(h - w + 1 for h, w in zip(held, written, strict=True) if h != w) if held != written else 1)


def _form(axis: int, first: Any) -> Form:
    """The TensorScatter. `first` is the first slot if the program has a number for it; otherwise it is a third
    input."""

    def scatter(past: torch.Tensor, new: torch.Tensor, *start: torch.Tensor) -> torch.Tensor:
        if start:
            rows = start[0].reshape(1).to(torch.int64).expand(past.shape[0])
        else:
            rows = torch.full((past.shape[0],), first, dtype=torch.int64, device=past.device)
        if new.dim() < past.dim():  # an assignment drops the batch where it is 1
            shape = [*past.shape[:axis], new.shape[axis - past.dim()], *past.shape[axis + 1 :]]
            new = new[(None,) * (past.dim() - new.dim())].expand(shape)
        out: torch.Tensor = torch.ops.fxfuse.tensor_scatter(past, new, rows, axis=axis)
        return out

    return scatter


def _write(node: Node) -> tuple[Node, Node, Any, int] | None:
    """A write taken apart: the buffer, what is written, the slots (an index, or the first as a number) and the axis."""
    name = op_name(node)
    if name not in ("index_copy", "index_put", "slice_scatter") or tensor(node) is None:
        return None
    past: Any = node.args[0]
    rank = fake(past).dim()
    new: Any
    if name == "index_copy":
        new, slots, axis = argument(node, "source"), argument(node, "index"), argument(node, "dim")
    elif name == "slice_scatter":
        new, slots, axis = argument(node, "src"), argument(node, "start") or 0, argument(node, "dim") or 0
        if argument(node, "step") not in (None, 1) or not isinstance(slots, int) or slots < 0:
            return None
        if op_name(new) == "copy":  # `buffer[:, :, 2:5].copy_(new)` reads the slice only to write over it
            new = new.args[1]
    else:
        indices: Any = argument(node, "indices")
        given = [i for i, index in enumerate(indices) if index is not None]
        if len(given) != 1 or argument(node, "accumulate") or fake(indices[given[0]]).dim() != 1:
            return None
        new, slots, axis = argument(node, "values"), indices[given[0]], given[0]
    if not isinstance(new, Node) or not _is_state(past):
        return None
    return past, new, slots, axis % rank


def _is_state(past: Any) -> bool:
    """Is it an input or a buffer, perhaps viewed otherwise?"""
    while isinstance(past, Node) and op_name(past) in LAYOUT and past.args:
        past = past.args[0]
    return isinstance(past, Node) and past.op == "placeholder"


def _start(slots: Node) -> Node | None:
    """The node of the one number that the slots are counted from; None where they do not come from one number."""
    ends = [slots]
    while ends:
        node = ends.pop()
        size: Any = fake(node).numel() if tensor(node) is not None else None
        if size == 1 and isinstance(size, int) and op_name(node) != "arange":
            return node
        if op_name(node) in _COUNTED | LAYOUT:
            ends.extend(i for i in node.all_input_nodes if tensor(i) is not None)
    return None


PATTERN = CacheWrite()
