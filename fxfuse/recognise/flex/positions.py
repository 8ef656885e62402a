"""Tensors that only count: what a program computes of sizes alone, such as the position of every token.

transformers captures position ids [B, S] and, from their differences, which of the packed samples a token belongs to;
where nobody gives position ids they are 0, 1, 2, … and there is one sample. Read operator by operator, never measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from fxfuse.graph.view import mutated, op_name, storage_roots, tensor

_DEEPEST = 60
_SAME = frozenset(["detach", "alias", "clone", "contiguous", "lift_fresh_copy", "to", "_to_copy"])
_FILLED = {"zeros": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1, "ones_like": 1, "new_ones": 1}
_COMPARED = {"eq": int.__eq__, "ne": int.__ne__}


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
    found = _counted(value, 0)
    return None if found is None or _written(value) else found


def _written(value: Node) -> bool:
    """Is anything that it is computed from written to in place? The graph names what was there before, too."""
    written = {root for node in value.graph.nodes for root in mutated(node)}
    seen: set[Node] = set()
    stack = [value] if written else []
    while stack:
        node = stack.pop()
        if node not in seen and tensor(node) is not None:
            seen.add(node)
            if storage_roots(node) & written:
                return True
            stack.extend(node.all_input_nodes)
    return False


def _counted(value: Any, depth: int) -> Counted | None:
    fake = tensor(value) if isinstance(value, Node) else None
    if fake is None or fake.dtype not in (torch.int64, torch.int32, torch.bool) or depth > _DEEPEST:
        return None
    if not isinstance(value, Node) or value.op != "call_function":
        return None
    found = _read(value, fake, depth + 1)
    if found is None or len(found.steps) != fake.dim():
        return None
    if fake.dtype == torch.bool and not (found.constant and found.start in (0, 1)):
        return None
    return replace(found, steps=tuple(0 if _one(n) else s for n, s in zip(fake.shape, found.steps, strict=True)))


def _read(node: Node, fake: torch.Tensor, depth: int) -> Counted | None:
    name, args = op_name(node), node.args
    if name in _FILLED:
        return Counted(_FILLED[name], (0,) * fake.dim())
    if name == "arange":
        return _arange(node)
    x = _counted(args[0], depth) if args else None
    if x is None:
        return None
    if name in _SAME:
        return x
    if name in ("add", "sub", "rsub"):
        return _sum(node, x, fake.dim(), depth)
    if name == "mul" and _is_int(args[1]):
        by: Any = args[1]
        return Counted(x.start * by, tuple(s * by for s in x.steps))
    if name in _COMPARED and x.constant and _is_int(args[1]):
        return Counted(int(_COMPARED[name](x.start, args[1])), x.steps)
    return _shaped(node, x, fake, depth)


def _shaped(node: Node, x: Counted, fake: torch.Tensor, depth: int) -> Counted | None:
    """Of operators on the dims of x."""
    name, args = op_name(node), node.args
    rank = len(x.steps)
    if name == "expand":
        return Counted(x.start, (0,) * (fake.dim() - rank) + x.steps)
    at: Any = args[1] if len(args) > 1 else 0
    if not _is_int(at):
        return None
    if name == "unsqueeze":
        at = at % (rank + 1)
        return Counted(x.start, (*x.steps[:at], 0, *x.steps[at:]))
    at = at % rank
    if name == "slice":
        start: Any = (args[2] if len(args) > 2 else None) or 0
        step: Any = args[4] if len(args) > 4 else 1
        known = _is_int(start) and start >= 0 and _is_int(step) and step == 1
        return replace(x, start=x.start + x.steps[at] * start) if known else None
    if name == "cumsum":
        if not x.constant or node.kwargs:
            return None
        return Counted(x.start, (*x.steps[:at], x.start, *x.steps[at + 1 :]))
    return _diff(node, x, depth) if name == "diff" else None


def _diff(node: Node, x: Counted, depth: int) -> Counted | None:
    """Of neighbours, with one element before the first: all of it one number, if that element continues the count."""
    given = dict(zip(("n", "dim", "prepend", "append"), node.args[1:], strict=False)) | dict(node.kwargs)
    dim: Any = given.get("dim", -1)
    before = given.get("prepend")
    if given.get("n", 1) != 1 or given.get("append") is not None or not _is_int(dim):
        return None
    dim = dim % len(x.steps)
    step = x.steps[dim]
    flat = Counted(step, (0,) * len(x.steps))
    if before is None:
        return flat
    first, fake = _counted(before, depth), tensor(before) if isinstance(before, Node) else None
    if first is None or fake is None or not _one(fake.shape[dim]):
        return None
    others = tuple(0 if d == dim else s for d, s in enumerate(x.steps))
    return flat if first == Counted(x.start - step, others) else None


def _sum(node: Node, x: Counted, rank: int, depth: int) -> Counted | None:
    other = node.args[1]
    y = Counted(other, ()) if _is_int(other) else _counted(other, depth)  # type: ignore[arg-type]
    if y is None or dict(node.kwargs) or len(node.args) > 2:
        return None
    first, second = {"add": (1, 1), "sub": (1, -1), "rsub": (-1, 1)}[op_name(node)]
    a, b = ((0,) * (rank - len(t.steps)) + t.steps for t in (x, y))
    steps = tuple(first * s + second * t for s, t in zip(a, b, strict=True))
    return Counted(first * x.start + second * y.start, steps)


def _arange(node: Node) -> Counted | None:
    start, step = 0, 1
    if len(node.args) > 1:
        start = node.args[0]  # type: ignore[assignment]
        step = node.args[2] if len(node.args) > 2 else 1  # type: ignore[assignment]
    return Counted(start, (step,)) if _is_int(start) and _is_int(step) else None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one(size: Any) -> bool:
    return isinstance(size, int) and size == 1
