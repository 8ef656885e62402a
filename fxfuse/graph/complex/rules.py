"""What operators do to the real and imaginary parts of complex tensors, one rule for each kind of operator.

Rounding is that of torch's own kernels, up to what a fused multiply-add saves them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from fxfuse.graph.complex.arithmetic import Arithmetic, NoRule, Part, Parts, aten, is_complex
from fxfuse.graph.view import CAST, LAYOUT, NO_OP, argument, fake, is_pure, op_name

Rule = Callable[[Node, Arithmetic], Parts]

_JOINS = frozenset(["cat", "concat", "concatenate", "stack", "hstack", "where", "masked_fill"])
_NOT_PARTWISE = frozenset(["view_as_complex", "view_as_real", "real", "imag", "adjoint", "mH"])
_SUMS = frozenset(["sum", "mean", "cumsum", "diff", "neg", "negative", "positive", "resolve_conj", "resolve_neg"])
_MOVES = frozenset(["triu", "tril", "diagonal", "unfold", "rot90", "ravel", "constant_pad_nd", "hsplit", "vsplit"])
LINEAR = (LAYOUT - _JOINS - _NOT_PARTWISE) | _SUMS | _MOVES | frozenset(["dsplit", "scatter", "index_put"])
"""Operators that move or sum the elements of one tensor. They do the same to the real and to the imaginary part."""
FLAG = "detach_"
"""Its name says that it writes in place; it changes no number."""
_BILINEAR = frozenset(["matmul", "mm", "bmm", "mv", "einsum", "outer", "kron"])
_AS_RESHAPE = {aten.view.default, aten._unsafe_view.default}
"""The parts lie in memory as they like."""


def parts_of(node: Node, do: Arithmetic) -> Parts:
    """The parts of a complex node.

    Raises:
        NoRule: there is no rule for the operator, or not for these arguments.
        Exception: whatever an operator raises for parts.
    """
    name = op_name(node)
    if name == FLAG:
        return do.of(node.args[0])
    if not is_pure(node):
        raise NoRule(name)
    if name in RULES:
        return RULES[name](node, do)
    if name in CAST or name in LINEAR or name in NO_OP:
        return _linear(node, do)
    raise NoRule(name)


def _call(node: Node, do: Arithmetic, *args: Any, **kwargs: Any) -> Node:
    """The node's operator on something else."""
    assert callable(node.target)
    return do.emit.call(node.target, *args, **kwargs)


def _linear(node: Node, do: Arithmetic) -> Parts:
    moved = node.args[0]
    if not isinstance(moved, Node) or node.target is aten.view.dtype:
        raise NoRule("what it moves is not its first argument")
    if op_name(node) in CAST:
        return do.of(moved)
    if any(isinstance(a, complex) for a in (*node.args, *node.kwargs.values())):
        raise NoRule("a complex number as an argument")
    if op_name(node) in ("scatter", "index_put") and not all(is_complex(n) for n in _values(node)):
        raise NoRule("a real tensor put into a complex one")
    kinds = {k: _real(v) for k, v in node.kwargs.items()}
    assert callable(node.target)
    target = aten.reshape.default if node.target in _AS_RESHAPE else node.target
    sources = [n for n in node.all_input_nodes if is_complex(n)]
    parts = {n: do.of(n) for n in sources}
    if len(sources) > 1:  # view_as, scatter: none may be missing
        parts = {n: do.filled(p) for n, p in parts.items()}

    def part(which: int) -> Part:
        if parts[moved][which] is None:
            return None

        def given(n: Node) -> Any:
            return parts[n][which] if n in parts else n

        return do.emit.call(target, *map_arg(node.args, given), **map_arg(kinds, given))

    return part(0), part(1)


def _values(node: Node) -> list[Node]:
    return [v for v in (argument(node, "values"), argument(node, "src")) if isinstance(v, Node)]


def _real(value: Any) -> Any:
    """If the argument is a complex type, the type of its parts; any other argument as it is."""
    if isinstance(value, torch.dtype) and value.is_complex:
        return torch.empty(0, dtype=value, device="meta").real.dtype
    return value


def _join(node: Node, do: Arithmetic) -> Parts:
    """Several tensors made one; those that are real have no imaginary part."""
    several = isinstance(node.args[0], (list, tuple))
    condition = None if several else node.args[op_name(node) == "masked_fill"]
    chosen: Any = node.args[0] if several else node.args[1:]
    if op_name(node) == "masked_fill":
        chosen = node.args[2], node.args[0]
    parts = [do.of(operand) for operand in chosen]
    like = next((p for both in parts for p in both if isinstance(p, Node)), None)
    if like is None:
        raise NoRule("numbers only")

    real = all(im is None for _, im in parts)
    whole = [_whole(p, like, do) for p in parts]

    def part(which: int) -> Part:
        if which and real:
            return None
        own = [both[which] for both in whole]
        if several:
            return _call(node, do, own, *node.args[1:], **node.kwargs)
        return do.emit.call(aten.where.self, condition, *own)

    return (part(0), part(1)) if several else do.widened((part(0), part(1)))


def _whole(parts: Parts, like: Node, do: Arithmetic) -> tuple[Node, Node]:
    if any(isinstance(p, Node) for p in parts):
        return do.filled(parts)
    return _tensor(parts[0], like, do), _tensor(parts[1], like, do)


def _tensor(part: Part, like: Node, do: Arithmetic) -> Node:
    """A number as a tensor without dims."""
    if isinstance(part, Node):
        return part
    number = 0.0 if part is None else part
    return do.emit.call(aten.full.default, [], number, dtype=do.real, device=fake(like).device)


def _sum(sign: int) -> Rule:
    def rule(node: Node, do: Arithmetic) -> Parts:
        alpha = argument(node, "alpha")
        (a, b), (c, d) = do.of(node.args[0]), do.of(node.args[1])
        if alpha not in (None, 1):
            c, d = do.product((c, d), do.of(alpha))
        combined = do.add if sign > 0 else do.sub
        return do.widened((combined(a, c), combined(b, d)))

    return rule


def _bilinear(node: Node, do: Arithmetic) -> Parts:
    einsum = op_name(node) == "einsum"
    pair: Any = node.args[1] if einsum else node.args[:2]
    if len(pair) != 2:
        raise NoRule("more than two factors")

    def mul(a: Part, b: Part) -> Part:
        if a is None or b is None:
            return None
        return _call(node, do, node.args[0], [a, b]) if einsum else _call(node, do, a, b)

    return do.product(do.of(pair[0]), do.of(pair[1]), mul)


def _power(node: Node, do: Arithmetic) -> Parts:
    """Small whole powers are repeated products. Any other real power is taken of the size, and multiplies the angle."""
    exponent: Any = 2 if op_name(node) == "square" else node.args[1]
    x = result = do.of(node.args[0])
    if isinstance(exponent, (int, float)) and exponent in range(1, 9):
        for _ in range(int(exponent) - 1):
            result = do.product(result, x)
        return result
    times, complex_part = do.of(exponent)
    if complex_part is not None or times is None:
        raise NoRule("a power that is not real, or 0")
    re, im = do.filled(x)
    power = aten.pow.Tensor_Tensor if isinstance(times, Node) else aten.pow.Tensor_Scalar
    size = do.emit.call(power, do.magnitude((re, im)), times)
    return do.widened(do.turned(size, do.mul(do.emit.call(aten.atan2.default, im, re), times)))


def _conjugate(node: Node, do: Arithmetic) -> Parts:
    re, im = do.of(node.args[0])
    if op_name(node) in ("adjoint", "mH"):
        re, im = (_call(node, do, p) if isinstance(p, Node) else p for p in (re, im))
    return re, do.neg(im)


def _made(node: Node, do: Arithmetic) -> Parts:
    """Tensors that are filled with one number: zeros, ones, full."""
    name, kinds = op_name(node), {k: _real(v) for k, v in node.kwargs.items()}
    if kinds.get("dtype") is None:
        kinds["dtype"] = do.real
    given = list(node.args)
    number = complex({"zeros": 0, "ones": 1}[name.split("_")[0]] if not name.startswith("full") else given.pop(1))  # type: ignore[arg-type]
    if name.endswith("_like"):
        base = given[0]
        if not isinstance(base, Node):
            raise NoRule(name)
        base = do.filled(do.of(base))[0]
        return tuple(do.emit.call(aten.full_like.default, base, n, **kinds) for n in (number.real, number.imag))  # type: ignore[return-value]
    return tuple(do.emit.call(aten.full.default, given[0], n, **kinds) for n in (number.real, number.imag))  # type: ignore[return-value]


def _pad(node: Node, do: Arithmetic) -> Parts:
    if argument(node, "mode") != "constant" or not isinstance(value := argument(node, "value") or 0.0, (int, float)):
        raise NoRule("padding with something else")
    re, im = (
        do.emit.call(aten.constant_pad_nd.default, part, node.args[1], by) if isinstance(part, Node) else part
        for part, by in zip(do.of(node.args[0]), (value, 0.0), strict=True)
    )
    return re, im


def _halves(node: Node, do: Arithmetic) -> Parts:
    """view_as_complex."""
    pairs = node.args[0]
    return do.emit.call(aten.select.int, pairs, -1, 0), do.emit.call(aten.select.int, pairs, -1, 1)


RULES: dict[str, Rule] = {
    "view_as_complex": _halves,
    "complex": lambda n, do: do.widened((do.cast(n.args[0]), do.cast(n.args[1]))),  # type: ignore[arg-type]
    "polar": lambda n, do: do.widened(do.turned(do.cast(n.args[0]), do.cast(n.args[1]))),  # type: ignore[arg-type]
    "exp": lambda n, do: do.exp(do.of(n.args[0])),
    "mul": lambda n, do: do.widened(do.product(do.of(n.args[0]), do.of(n.args[1]))),
    "multiply": lambda n, do: do.widened(do.product(do.of(n.args[0]), do.of(n.args[1]))),
    "div": lambda n, do: do.widened(do.quotient(do.of(n.args[0]), do.of(n.args[1]))),
    "true_divide": lambda n, do: do.widened(do.quotient(do.of(n.args[0]), do.of(n.args[1]))),
    "reciprocal": lambda n, do: do.quotient((1.0, None), do.of(n.args[0])),
    "add": _sum(1),
    "sub": _sum(-1),
    "pow": _power,
    "square": _power,
    "pad": _pad,
    **dict.fromkeys(("conj", "_conj", "conj_physical", "_conj_physical", "adjoint", "mH"), _conjugate),
    **dict.fromkeys(_JOINS, _join),
    **dict.fromkeys(_BILINEAR, _bilinear),
    **dict.fromkeys((f"{n}{like}" for n in ("zeros", "ones", "full") for like in ("", "_like")), _made),
}
"""Rules by the operator's name."""


def real_result(node: Node, do: Arithmetic) -> Node:
    """What a real node computes, from the parts of the complex ones that it reads.

    Raises:
        NoRule: there is no rule for the operator.
        Exception: whatever an operator raises for parts.
    """
    name, x = op_name(node), node.args[0]
    if name not in READS or not is_pure(node) or not isinstance(x, Node) or not is_complex(x):
        raise NoRule(name)
    parts = do.of(x)
    if name == "view_as_real":
        return do.joined(parts)
    if name == "abs":
        return do.magnitude(parts)
    re, im = do.filled(parts)
    if name == "angle":
        return do.emit.call(aten.atan2.default, im, re)
    if name == "sym_size":
        return _call(node, do, re, *node.args[1:])
    found = im if name == "imag" else do.cast(re, fake(node).dtype)
    assert isinstance(found, Node)
    return found


READS = CAST | frozenset(["view_as_real", "real", "imag", "abs", "angle", "sym_size"])
"""Operators that give something real of something complex."""
