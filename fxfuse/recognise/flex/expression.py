"""What a mod computes, as an expression over the score, the indices and what was captured.

A mod is written for scalars. The same operators on broadcast grids, b as [B, 1, 1, 1], h as [1, H, 1, 1], q as
[1, 1, S, 1] and kv as [1, 1, 1, T], give all scores at once, each value only as large as what it depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxfuse.graph.view import is_random, op_name

INDICES = ("b", "h", "q", "kv")
_SAME = frozenset(
    ["lift_fresh_copy", "detach", "detach_", "alias", "clone", "contiguous", "view", "reshape", "squeeze", "expand"]
)
"""On scalars these change nothing."""
_ELEMENTWISE = frozenset(["to", "_to_copy", "where", "floor_divide", "type_as"])
"""Elementwise, but not tagged so."""
_FILLED = {"new_ones": 1, "ones": 1, "ones_like": 1, "new_zeros": 0, "zeros": 0, "zeros_like": 0}
LOGICAL = frozenset(["__and__", "bitwise_and", "__or__", "bitwise_or", "__xor__", "bitwise_xor", "bitwise_not"])
_MOD_INDEX = "torch._dynamo._trace_wrapped_higher_order_op.ModIndex"
"""What `table[i]` became: the graph has the class, or its name."""
OVER_DIMS = frozenset(["sum", "mean", "amax", "amin", "any", "all", "prod", "select", "softmax", "_softmax"])


class Unreadable(Exception):
    """A mod uses what has no meaning on grids; the message says what."""


@dataclass(frozen=True, eq=False)
class Expr:
    """One value of a mod: a leaf (no target), or an operator on other values."""

    target: Callable[..., Any] | None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    """None: a size, a Python number while tracing."""
    rank: int = 0
    """Of the value as the mod sees it: 0 but for rows of tables."""
    shape: tuple[Any, ...] = ()
    leaf: str = ""
    """``"score"``, an index, ``"score 0"`` for a captured value; ``"constant"``, whose value is in `args`."""

    @cached_property
    def leaves(self) -> frozenset[str]:
        """The names of everything that it depends on."""
        found = frozenset([self.leaf]) if self.leaf and self.leaf != "constant" else frozenset()
        return found.union(*(child.leaves for child in self.children))

    @property
    def free(self) -> bool:
        """Depends on no position: one value, of whatever rank, computed as it stands."""
        return not self.leaves & {"score", *INDICES}

    @property
    def children(self) -> list[Expr]:
        found: list[Expr] = []
        _each((self.args, self.kwargs), found.append)
        return found

    def walk(self) -> Iterator[Expr]:
        """It and everything that it is made of, each once."""
        seen: set[Expr] = set()
        stack = [self]
        while stack:
            expr = stack.pop()
            if expr not in seen:
                seen.add(expr)
                yield expr
                stack.extend(expr.children)

    @cached_property
    def name(self) -> str:
        """The operator's name, ``"mul"``; ``""`` for leaves."""
        if self.target is None:
            return ""
        schema = getattr(self.target, "_schema", None)
        return str(schema.name.split("::")[1]) if schema is not None else getattr(self.target, "__name__", "")

    @property
    def number(self) -> float | int | bool | None:
        """Its value, where it is one number for all scores."""
        if self.leaf == "constant" and self.args[0].numel() == 1:
            return self.args[0].item()  # type: ignore[no-any-return]
        return None


def leaf(name: str, dtype: torch.dtype | None, shape: tuple[Any, ...] = ()) -> Expr:
    return Expr(None, dtype=dtype, rank=len(shape), shape=shape, leaf=name)


def constant(value: torch.Tensor) -> Expr:
    return Expr(None, (value,), dtype=value.dtype, rank=value.dim(), shape=tuple(value.shape), leaf="constant")


def call(target: Callable[..., Any], *args: Any, dtype: torch.dtype | None) -> Expr:
    """An operator on scalars, of this type."""
    return Expr(target, args, dtype=dtype)


def captured(kind: str, values: Sequence[Any]) -> list[Expr]:
    """Leaves for what a mod captured: ``"score 0"``, ``"score 1"``, …"""
    found = []
    for i, value in enumerate(values):
        fake: Any = value.meta.get("val") if isinstance(value, Node) else value
        if isinstance(fake, torch.Tensor):
            found.append(leaf(f"{kind} {i}", fake.dtype, tuple(fake.shape)))
        else:
            found.append(leaf(f"{kind} {i}", None))
    return found


def expression(mod: GraphModule, inputs: Sequence[Expr]) -> Expr:
    """What the mod returns, in terms of `inputs`.

    Raises:
        Unreadable: it calls what has no meaning on grids.
    """
    env: dict[Node, Any] = {}
    given = iter(inputs)
    for node in mod.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(given)
        elif node.op == "get_attr":
            value = getattr(mod, str(node.target), None)
            env[node] = constant(value) if isinstance(value, torch.Tensor) else value
        elif node.op == "output":
            (result,) = node.args if not isinstance(node.args[0], (tuple, list)) else node.args[0]
            return env[result]  # type: ignore[no-any-return]
        else:
            env[node] = _read(node, env)
    raise Unreadable("it returns nothing")


def _read(node: Node, env: Mapping[Node, Any]) -> Any:
    args: Any = map_arg(node.args, env.__getitem__)
    kwargs = map_arg(dict(node.kwargs), env.__getitem__)
    value = node.meta.get("val")
    dtype = value.dtype if isinstance(value, torch.Tensor) else None
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
    rank = len(shape)
    name = op_name(node)
    full = str(node.target)
    if full == "flat_apply":
        called = [
            i for i, arg in enumerate(node.args) if arg == _MOD_INDEX or getattr(arg, "__name__", "") == "ModIndex"
        ]
        if not called:
            raise Unreadable("it calls an autograd.Function")
        table, *indices = args[called[0] + 1 :]
        return Expr(torch.ops.aten.index.Tensor, (table, tuple(indices)), dtype=dtype, rank=rank, shape=shape)
    if full.startswith("approx.tanh"):  # attention-gym's, which is tanh but for a faster instruction on GPUs
        return Expr(torch.ops.aten.tanh.default, args, dtype=dtype, rank=rank)
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        raise Unreadable(f"it calls {full}")
    if rank == 0 and name in _SAME and args and isinstance(args[0], Expr) and args[0].rank == 0:
        return args[0]
    if rank == 0 and (fill := _filled(name, args)) is not None:
        return constant(torch.tensor(fill, dtype=dtype))
    tags: Any = getattr(node.target, "tags", ())
    known = torch.Tag.pointwise in tags or name in _ELEMENTWISE or name in LOGICAL
    known = known or name in OVER_DIMS or name == "index" or dtype is None  # a size
    operands: list[Expr] = []
    _each((args, kwargs), operands.append)
    free = all(x.free for x in operands) and not is_random(node)
    # Of what varies with positions neither a size nor a Python number is asked.
    known = free or (known and (dtype is not None or all(x.dtype is None for x in operands)))
    schema = getattr(node.target, "_schema", None)
    if not known or (schema is not None and schema.is_mutable):
        raise Unreadable(f"it calls {full}")
    target: Any = node.target
    return Expr(target, args, kwargs, dtype=dtype, rank=rank, shape=shape)


def _filled(name: str, args: Sequence[Any]) -> Any:
    if name in _FILLED:
        return _FILLED[name]
    position = {"new_full": 2, "full": 1, "full_like": 1, "scalar_tensor": 0}.get(name)
    value = args[position] if position is not None and len(args) > position else None
    return value if isinstance(value, (int, float, bool)) else None


def _each(arg: Any, found: Callable[[Expr], None]) -> None:
    if isinstance(arg, Expr):
        found(arg)
    elif isinstance(arg, (list, tuple)):
        for a in arg:
            _each(a, found)
    elif isinstance(arg, Mapping):
        for a in arg.values():
            _each(a, found)
