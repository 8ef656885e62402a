"""Expressions computed for all scores at once, on broadcast grids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fxfuse.patterns.flex_attention.expression import INDICES, OVER_DIMS, Expr, Unreadable
from fxfuse.torch_seams import overload_name, without_modes

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


_WRITTEN = 64
"""A constant of more elements is no constant but a table."""


def _as_tensor(size: Any) -> torch.Tensor:
    return torch.scalar_tensor(size, dtype=torch.int64)


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
        self._raws: dict[Expr, Any] = {}

    def __call__(self, expr: Expr) -> Any:
        if expr not in self._known:
            self._known[expr] = self._upcast(self._value(expr))
        return self._known[expr]

    def _value(self, expr: Expr) -> Any:
        if expr.target is None:
            value = self._own(expr)
            on_grid = expr.leaf in ("score", *INDICES)
            if not isinstance(value, torch.Tensor) or on_grid:
                return value
            return value.reshape((1,) * 4 + tuple(value.shape))
        if expr.name == "index":
            return self._index(expr)
        if expr.free:
            value = self._raw(expr)
            return value.reshape((1,) * 4 + tuple(value.shape)) if isinstance(value, torch.Tensor) else value
        if expr.name in OVER_DIMS:
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
        target = expr.target
        if overload_name(target) == "Scalar" and any(isinstance(a, torch.SymInt) for a in args):
            # Operators of a number are translated to ONNX for numbers that are known.
            args = tuple(_as_tensor(a) if isinstance(a, torch.SymInt) else a for a in args)
            target = target.overloadpacket.Tensor  # type: ignore[attr-defined]
        return target(*args, **kwargs)

    def _raw(self, expr: Expr) -> Any:
        """The value of what depends on no position."""
        if expr.target is None:
            return self._upcast(self._own(expr))
        if expr not in self._raws:
            args, kwargs = (self._args(a, expr, self._raw) for a in (expr.args, dict(expr.kwargs)))
            self._raws[expr] = self._upcast(expr.target(*args, **kwargs))
        return self._raws[expr]

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

    def _args(self, arg: Any, expr: Expr, value_of: Callable[[Expr], Any] | None = None) -> Any:
        if isinstance(arg, Expr):
            if value_of is not None:
                return value_of(arg)
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
            return type(arg)(self._args(a, expr, value_of) for a in arg)
        if isinstance(arg, dict):
            return {k: self._args(v, expr, value_of) for k, v in arg.items()}
        return arg

    def _index(self, expr: Expr) -> torch.Tensor:
        table, indices = expr.args
        places = [self(i) if isinstance(i, Expr) else i for i in indices]
        if any(p is None or (isinstance(i, Expr) and i.rank) for p, i in zip(places, indices, strict=True)):
            raise Unreadable("it indexes with more than scalars")
        if table.free:
            return self._raw(table)[tuple(places)]  # type: ignore[no-any-return]
        value = self(table)
        own = [
            torch.arange(size, device=value.device).reshape([-1 if d == axis else 1 for d in range(4)])
            for axis, size in enumerate(value.shape[:4])
        ]
        return value[(*own, *places)]  # type: ignore[no-any-return]

    def _own(self, expr: Expr) -> Any:
        """A leaf's value as it was captured; constants are written into the graph."""
        if expr.leaf != "constant":
            return self.env[expr.leaf]
        value, device = expr.args[0], self.env["q"].device
        if value.numel() > _WRITTEN:
            raise Unreadable("it holds a table, which is to be captured")
        with without_modes():  # read, and not traced
            held = value.flatten().tolist()
        numbers = [torch.full((), v, dtype=value.dtype, device=device) for v in held]
        return numbers[0] if value.dim() == 0 else torch.stack(numbers).reshape(value.shape)

    def _upcast(self, value: Any) -> Any:
        if self.exact and isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            return value.to(torch.float64)
        return value
