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
from torch._dynamo._trace_wrapped_higher_order_op import ModIndex
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxfuse.graph.view import op_name

INDICES = ("b", "h", "q", "kv")
_SAME = frozenset(
    ["lift_fresh_copy", "detach", "detach_", "alias", "clone", "contiguous", "view", "reshape", "squeeze", "expand"]
)
"""On scalars these change nothing."""
_ELEMENTWISE = frozenset(["to", "_to_copy", "where", "floor_divide", "type_as"])
"""Elementwise, but not tagged so."""
_FILLED = {"new_ones": 1, "ones": 1, "ones_like": 1, "new_zeros": 0, "zeros": 0, "zeros_like": 0}
_LOGICAL: dict[str, Callable[..., Any]] = {
    "__and__": torch.logical_and,
    "bitwise_and": torch.logical_and,
    "mul": torch.logical_and,
    "__or__": torch.logical_or,
    "bitwise_or": torch.logical_or,
    "__xor__": torch.logical_xor,
    "bitwise_xor": torch.logical_xor,
    "bitwise_not": torch.logical_not,
}
"""On booleans these are the same, and the ones that ONNX has."""
_MOD_INDEX = f"{ModIndex.__module__}.{ModIndex.__qualname__}"
"""How the graph names what `table[i]` became."""
_OVER_DIMS = frozenset(["sum", "mean", "amax", "amin", "any", "all", "prod", "select", "softmax", "_softmax"])


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
    leaf: str = ""
    """``"score"``, an index, ``"score 0"`` for a captured value; ``"constant"``, whose value is in `args`."""

    @cached_property
    def leaves(self) -> frozenset[str]:
        """The names of everything that it depends on."""
        found = frozenset([self.leaf]) if self.leaf and self.leaf != "constant" else frozenset()
        return found.union(*(child.leaves for child in self.children))

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


def leaf(name: str, dtype: torch.dtype | None, rank: int = 0) -> Expr:
    return Expr(None, dtype=dtype, rank=rank, leaf=name)


def constant(value: torch.Tensor) -> Expr:
    return Expr(None, (value,), dtype=value.dtype, rank=value.dim(), leaf="constant")


def call(target: Callable[..., Any], *args: Any, dtype: torch.dtype | None) -> Expr:
    """An operator on scalars, of this type."""
    return Expr(target, args, dtype=dtype)


def captured(kind: str, values: Sequence[Any]) -> list[Expr]:
    """Leaves for what a mod captured: ``"score 0"``, ``"score 1"``, …"""
    found = []
    for i, value in enumerate(values):
        fake: Any = value.meta.get("val") if isinstance(value, Node) else value
        if isinstance(fake, torch.Tensor):
            found.append(leaf(f"{kind} {i}", fake.dtype, fake.dim()))
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
    rank = value.dim() if isinstance(value, torch.Tensor) else 0
    name = op_name(node)
    full = str(node.target)
    if full == "flat_apply":
        called = [i for i, arg in enumerate(node.args) if arg is ModIndex or arg == _MOD_INDEX]
        if not called:
            raise Unreadable("it calls an autograd.Function")
        table, *indices = args[called[0] + 1 :]
        return Expr(torch.ops.aten.index.Tensor, (table, tuple(indices)), dtype=dtype, rank=rank)
    if full.startswith("approx.tanh"):  # attention-gym's, which is tanh but for a faster instruction on GPUs
        return Expr(torch.ops.aten.tanh.default, args, dtype=dtype, rank=rank)
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        raise Unreadable(f"it calls {full}")
    if rank == 0 and name in _SAME and args and isinstance(args[0], Expr) and args[0].rank == 0:
        return args[0]
    if rank == 0 and (fill := _filled(name, args)) is not None:
        return constant(torch.tensor(fill, dtype=dtype))
    tags: Any = getattr(node.target, "tags", ())
    known = torch.Tag.pointwise in tags or name in _ELEMENTWISE or name in _LOGICAL
    known = known or name in _OVER_DIMS or name in ("index", "arange") or dtype is None
    schema = getattr(node.target, "_schema", None)
    if not known or (schema is not None and schema.is_mutable):
        raise Unreadable(f"it calls {full}")
    return Expr(node.target, args, kwargs, dtype=dtype, rank=rank)  # type: ignore[arg-type]


def _filled(name: str, args: Sequence[Any]) -> Any:
    if name in _FILLED:
        return _FILLED[name]
    position = {"new_full": 2, "full": 1, "full_like": 1, "scalar_tensor": 0}.get(name)
    value = args[position] if position is not None and len(args) > position else None
    return value if isinstance(value, (int, float, bool)) else None


class Grid:
    """Values of expressions on broadcast grids [B, H, S, T].

    Args:
        env: the value of every leaf.
        exact: floating-point types are all float64, as the region is evaluated to prove the same function.
    """

    def __init__(self, env: Mapping[str, Any], *, exact: bool) -> None:
        self.env = env
        self.exact = exact
        self._known: dict[Expr, Any] = {}

    def __call__(self, expr: Expr) -> Any:
        if expr not in self._known:
            self._known[expr] = self._upcast(self._value(expr))
        return self._known[expr]

    def _value(self, expr: Expr) -> Any:
        if expr.target is None:
            value = expr.args[0] if expr.leaf == "constant" else self.env[expr.leaf]
            on_grid = expr.leaf in ("score", *INDICES)
            if not isinstance(value, torch.Tensor) or on_grid:
                return value
            if expr.leaf == "constant" and value.dim() == 0:
                value = torch.full((), value.item(), dtype=value.dtype, device=self.env["q"].device)
            return value.reshape((1,) * 4 + tuple(value.shape))
        if expr.name == "index":
            return self._index(expr)
        if expr.name in _OVER_DIMS:
            return self._over_dims(expr)
        args = self._args(expr.args, expr)
        kwargs = self._args(dict(expr.kwargs), expr)
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if expr.dtype == torch.bool:
            if expr.name == "where":
                kept, chosen, otherwise = args
                return (kept & chosen) | (~kept & otherwise)
            if expr.name in _LOGICAL and tensors and all(t.dtype == torch.bool for t in tensors):
                return _LOGICAL[expr.name](*args)
        value = expr.target(*args, **kwargs)
        return value.reshape(1, 1, 1, 1, -1) if expr.name == "arange" else value

    def _over_dims(self, expr: Expr) -> torch.Tensor:
        """A reduction over dims of a row; those of the grid stay."""
        row, *rest = expr.args
        value = self(row)
        dims = rest[0] if rest else None
        if dims is None:
            return getattr(torch, expr.name)(value, dim=tuple(range(4, value.dim())))  # type: ignore[no-any-return]
        behind = [d if d < 0 else d - row.rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
        given = behind if isinstance(dims, (list, tuple)) else behind[0]
        more, kwargs = self._args(tuple(rest[1:]), expr), self._args(dict(expr.kwargs), expr)
        return expr.target(value, given, *more, **kwargs)  # type: ignore[no-any-return, misc]

    def _args(self, arg: Any, expr: Expr) -> Any:
        if isinstance(arg, Expr):
            value = self(arg)
            pad = expr.rank - arg.rank
            if pad > 0 and isinstance(value, torch.Tensor):
                value = value.reshape(tuple(value.shape[:4]) + (1,) * pad + tuple(value.shape[4:]))
            return value
        if isinstance(arg, torch.dtype):
            return torch.float64 if self.exact and arg.is_floating_point else arg
        if isinstance(arg, torch.device):
            return self.env["q"].device
        if isinstance(arg, (list, tuple)):
            return type(arg)(self._args(a, expr) for a in arg)
        if isinstance(arg, dict):
            return {k: self._args(v, expr) for k, v in arg.items()}
        return arg

    def _index(self, expr: Expr) -> torch.Tensor:
        table, indices = expr.args
        places = [self(i) if isinstance(i, Expr) else i for i in indices]
        if any(p is None or (isinstance(i, Expr) and i.rank) for p, i in zip(places, indices, strict=True)):
            raise Unreadable("it indexes with more than scalars")
        if table.target is None:  # nothing of it depends on an index
            value = table.args[0] if table.leaf == "constant" else self.env[table.leaf]
            return self._upcast(value)[tuple(places)]  # type: ignore[no-any-return]
        value = self(table)
        own = [
            torch.arange(size, device=value.device).reshape([-1 if d == axis else 1 for d in range(4)])
            for axis, size in enumerate(value.shape[:4])
        ]
        return value[(*own, *places)]  # type: ignore[no-any-return]

    def _upcast(self, value: Any) -> Any:
        if self.exact and isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            return value.to(torch.float64)
        return value


def _each(arg: Any, found: Callable[[Expr], None]) -> None:
    if isinstance(arg, Expr):
        found(arg)
    elif isinstance(arg, (list, tuple)):
        for a in arg:
            _each(a, found)
    elif isinstance(arg, Mapping):
        for a in arg.values():
            _each(a, found)
