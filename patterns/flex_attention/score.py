"""What a score_mod makes of the score: where(keep, cap(a · s) + b, -inf), or why it is not that.

Every operator of the mod is a step of this algebra; what no step covers (a square, a clamp, a mask that looks at the
score) is a reason. Numbers are never fitted: clamp(s, -50, 50) would pass for s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxfuse.patterns.flex_attention.expression import Expr, call, constant

aten = torch.ops.aten
WORKING = torch.float32
"""In which type flex_attention computes scores, but for float64."""


@dataclass(frozen=True)
class Factor:
    """The score is multiplied with this, or divided by it."""

    value: Expr
    inverse: bool = False


@dataclass(frozen=True)
class Score:
    """where(keep, cap · tanh(number · factors · s) + bias, -inf), or without a cap number · factors · s + bias."""

    number: float = 1.0
    factors: tuple[Factor, ...] = ()
    cap: float | None = None
    bias: Expr | None = None
    keep: tuple[Expr, ...] = ()
    """All of these hold where the key is kept."""


@dataclass(frozen=True)
class Opaque:
    """The score is no such thing; the reason says which step it was."""

    reason: str


Value = Score | Opaque
_IDENTITY = frozenset(
    ["to", "_to_copy", "float", "double", "half", "type_as", "clone", "detach", "alias", "contiguous"]
)


def read_score(expr: Expr) -> Value:
    """The mod's result, in terms of the score; never a guess."""
    return _Reader().read(expr)


class _Reader:
    def __init__(self) -> None:
        self.known: dict[Expr, Value] = {}

    def read(self, expr: Expr) -> Value:
        if expr not in self.known:
            self.known[expr] = self._read(expr)
        return self.known[expr]

    def _read(self, expr: Expr) -> Value:
        if expr.leaf == "score":
            return Score()
        if "score" not in expr.leaves:
            return Score(0.0, bias=expr)
        step: Callable[..., Value] | None = getattr(self, f"_{expr.name}", None)
        if expr.name in _IDENTITY:
            kept = expr.dtype is not None and expr.dtype.is_floating_point
            return self.read(expr.args[0]) if kept else Opaque(f"the score is cast to {expr.dtype}")
        if step is None or expr.rank:
            return Opaque(f"{expr.name} of the score")
        return step(expr)

    def _neg(self, expr: Expr) -> Value:
        return self._scaled(expr.args[0], constant(torch.tensor(-1.0)), expr, inverse=False)

    def _mul(self, expr: Expr) -> Value:
        x, y = expr.args[:2]
        if _has_score(x) and _has_score(y):
            return Opaque("the score times itself")
        return self._scaled(x, y, expr) if _has_score(x) else self._scaled(y, x, expr)

    def _div(self, expr: Expr) -> Value:
        x, y = expr.args[:2]
        if _has_score(y):
            return Opaque("a division by the score")
        if expr.kwargs.get("rounding_mode") is not None:
            return Opaque("the score is rounded")
        return self._scaled(x, y, expr, inverse=True)

    _true_divide = _div

    def _add(self, expr: Expr) -> Value:
        return self._sum(expr, expr.args[0], expr.args[1], 1.0)

    def _sub(self, expr: Expr) -> Value:
        return self._sum(expr, expr.args[0], expr.args[1], -1.0)

    def _rsub(self, expr: Expr) -> Value:
        return self._sum(expr, expr.args[1], expr.args[0], -1.0)

    def _tanh(self, expr: Expr) -> Value:
        x = self.read(expr.args[0])
        if isinstance(x, Opaque):
            return x
        if x.keep:
            return Opaque("softcap of a masked score")
        if x.bias is not None:
            return Opaque("softcap of a score that was biased before")
        if x.cap is not None:
            return Opaque("softcap of a softcap")
        return replace(x, cap=1.0)

    def _where(self, expr: Expr) -> Value:
        condition, chosen, otherwise = expr.args
        if _has_score(condition):
            return Opaque("a mask that depends on the score")
        if _is(otherwise, -math.inf):
            return self._kept(chosen, condition)
        if _is(chosen, -math.inf):
            return self._kept(otherwise, negated(condition))
        x, y = self._value(chosen), self._value(otherwise)
        if isinstance(x, Opaque) or isinstance(y, Opaque):
            return x if isinstance(x, Opaque) else y
        if x.cap != y.cap and not (x.number == 0 or y.number == 0):
            return Opaque("two softcaps, chosen by position")
        return _merged(condition, x, y)

    def _masked_fill(self, expr: Expr) -> Value:
        x, condition, value = expr.args
        return self._where(Expr(aten.where.self, (condition, value, x), dtype=expr.dtype))

    def _value(self, arg: Any) -> Value:
        return self.read(arg) if isinstance(arg, Expr) else Score(0.0, bias=constant(torch.tensor(float(arg))))

    def _kept(self, arg: Any, condition: Expr) -> Value:
        x = self._value(arg)
        return x if isinstance(x, Opaque) else replace(x, keep=(*x.keep, *conjuncts(condition)))

    def _scaled(self, arg: Any, by: Any, expr: Expr, inverse: bool = False) -> Value:
        """The score, times (or over) what does not depend on it."""
        x = self._value(arg)
        if isinstance(x, Opaque):
            return x
        number = _number(by)
        if number is not None and (not math.isfinite(number) or (inverse and number == 0)):
            return Opaque("the score times a number that is not finite")
        if x.keep and not (number is not None and number > 0):
            return Opaque("a masked score times what may not be positive")
        bias = None if x.bias is None else _binary(aten.div if inverse else aten.mul, x.bias, by)
        if number is not None:
            number = 1 / number if inverse else number
            if x.cap is None:
                return replace(x, number=x.number * number, bias=bias)
            if number == 0:
                return replace(x, number=0.0, cap=None, bias=bias)
            # tanh is odd: a negative factor goes inside.
            return replace(x, cap=x.cap * abs(number), number=math.copysign(x.number, x.number * number), bias=bias)
        if x.cap is not None:
            return Opaque("softcap with a size that varies")
        if x.number == 0:
            return replace(x, bias=bias)
        return replace(x, factors=(*x.factors, Factor(by, inverse)), bias=bias)

    def _sum(self, expr: Expr, first: Any, second: Any, sign: float) -> Value:
        alpha = expr.kwargs.get("alpha", expr.args[2] if len(expr.args) > 2 else 1)
        x, y = self._value(first), self._value(second)
        times = sign * alpha
        if isinstance(x, Score) and isinstance(y, Score) and times != 1:
            y = self._scaled_value(y, times)
        if isinstance(x, Opaque) or isinstance(y, Opaque):
            return x if isinstance(x, Opaque) else y
        bias = x.bias if y.bias is None else y.bias if x.bias is None else _binary(aten.add, x.bias, y.bias)
        keep = (*x.keep, *y.keep)
        if y.number == 0 or x.number == 0:
            scored = x if y.number == 0 else y
            return replace(scored, bias=bias, keep=keep)
        if x.cap is None and y.cap is None:
            if x.factors == y.factors:
                return replace(x, number=x.number + y.number, bias=bias, keep=keep)
            factor = _binary(aten.add, product(x), product(y))
            return Score(factors=(Factor(factor),), bias=bias, keep=keep)
        return Opaque("a sum of softcapped scores")

    def _scaled_value(self, x: Score, times: float) -> Value:
        held = Expr(None, dtype=WORKING, leaf="score")
        self.known[held] = x
        return self._scaled(held, times, held)


def product(score: Score) -> Expr:
    """What the score is multiplied with in all."""
    result = constant(torch.tensor(score.number, dtype=WORKING))
    for factor in score.factors:
        result = _binary(aten.div if factor.inverse else aten.mul, result, factor.value)
    return result


def conjuncts(condition: Expr) -> tuple[Expr, ...]:
    """The conditions that must all hold."""
    if condition.name in ("__and__", "logical_and", "bitwise_and", "mul") and condition.dtype == torch.bool:
        return conjuncts(condition.args[0]) + conjuncts(condition.args[1])
    if condition.name in ("logical_not", "bitwise_not") and condition.args[0].dtype == torch.bool:
        inner = condition.args[0]
        if inner.name in ("__or__", "logical_or", "bitwise_or"):
            return conjuncts(negated(inner.args[0])) + conjuncts(negated(inner.args[1]))
        if inner.name in ("logical_not", "bitwise_not") and inner.args[0].dtype == torch.bool:
            return conjuncts(inner.args[0])
    if condition.number is not None and bool(condition.number):
        return ()
    return (condition,)


def negated(condition: Expr) -> Expr:
    return call(aten.logical_not.default, condition, dtype=torch.bool)


def _merged(condition: Expr, x: Score, y: Score) -> Value:
    """x where the condition holds, else y."""
    zero = constant(torch.tensor(0.0))

    def choose(a: Expr, b: Expr, dtype: torch.dtype = WORKING) -> Expr:
        return a if a is b else call(aten.where.self, condition, a, b, dtype=dtype)

    bias = None
    if x.bias is not None or y.bias is not None:
        bias = choose(_floating(x.bias or zero), _floating(y.bias or zero))
    kept: tuple[Expr, ...] = ()
    if x.keep or y.keep:
        kept = (choose(_all(x.keep), _all(y.keep), torch.bool),)
    if x.factors == y.factors and x.number == y.number:
        return replace(x, bias=bias, keep=kept)
    cap = x.cap if x.number else y.cap
    return Score(1.0, (Factor(choose(product(x), product(y))),), cap, bias, kept)


def _all(conditions: tuple[Expr, ...]) -> Expr:
    result = constant(torch.tensor(True))
    for condition in conditions:
        result = condition if result.number else call(aten.logical_and.default, result, condition, dtype=torch.bool)
    return result


def _binary(packet: Any, x: Any, y: Any) -> Expr:
    dtype = WORKING
    if packet is not aten.div and all(isinstance(v, Expr) and v.dtype is not None for v in (x, y)):
        dtype = torch.promote_types(x.dtype, y.dtype)
    return call(packet.Tensor if isinstance(y, Expr) and y.dtype is not None else packet.Scalar, x, y, dtype=dtype)


def _floating(expr: Expr) -> Expr:
    if expr.dtype is not None and expr.dtype.is_floating_point:
        return expr
    return Expr(aten.to.dtype, (expr, WORKING), dtype=WORKING)


def _has_score(arg: Any) -> bool:
    return isinstance(arg, Expr) and "score" in arg.leaves


def _number(arg: Any) -> float | None:
    value = arg.number if isinstance(arg, Expr) else arg
    return float(value) if isinstance(value, (int, float)) else None


def _is(arg: Any, value: float) -> bool:
    return _number(arg) == value
