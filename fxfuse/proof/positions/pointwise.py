"""What elementwise operators do to terms. A rule gives None for a step that is not exact, which is then one of which
nothing is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from fxfuse.graph.view import argument, fake, op_name, tensor
from fxfuse.proof import arithmetic
from fxfuse.proof.arithmetic import Comparison, float_number, kept, like, narrowed, numbers
from fxfuse.proof.positions.elements import Elements, dtype_of, kind_of
from fxfuse.proof.positions.terms import Term, Unreadable

Step = Callable[[Elements, Node, tuple[Term, ...]], "Term | None"]


def _cast(reader: Elements, node: Node, index: tuple[Term, ...]) -> Term | None:
    source = node.args[0]
    assert isinstance(source, Node)
    return narrowed(reader.terms, reader.operand(source, index), fake(source).dtype, fake(node).dtype)


def of_constants(reader: Elements, node: Node, index: tuple[Term, ...]) -> Term | None:
    """Any operator on a tensor whose element chooses between a few constants: it is computed for each of them."""
    places = [n for n, a in enumerate(node.args) if isinstance(a, Node)]
    if len(places) != 1 or any(isinstance(a, Node) for a in node.kwargs.values()):
        return None
    source: Any = node.args[places[0]]
    if tensor(source) is None or fake(source).dtype.is_complex:
        return None
    term = reader.operand(source, index)
    if (numbers(term) or arithmetic.LEAVES + 1) > arithmetic.LEAVES:
        return None

    def leaf(value: Any, _: Any) -> Term:
        held = torch.tensor(value, dtype=fake(source).dtype)
        args = [held if n == places[0] else a for n, a in enumerate(node.args)]
        result = node.target(*args, **node.kwargs).item()  # type: ignore[operator]
        if value == 0 and held.is_floating_point() and math.isinf(result):
            args[places[0]] = -held
            if node.target(*args, **node.kwargs).item() != result:  # type: ignore[operator]
                raise Unreadable(f"{op_name(node)} of zero, which has a sign")
        if isinstance(result, float):
            return float_number(reader.terms, result)
        return reader.terms.number(result)

    return arithmetic.both(reader.terms, term, reader.terms.number(0), leaf)


def _two(reader: Elements, node: Node, index: tuple[Term, ...]) -> tuple[Term, Term] | None:
    if len(node.args) < 2:
        return None
    dtype = fake(node).dtype
    if dtype == torch.bool or dtype.is_complex:
        x, y = (reader.operand(a, index) for a in node.args[:2])
        return x, y
    x, y = (in_type(reader, a, index, dtype) for a in node.args[:2])
    return (x, y) if kind_of(dtype) == "real" or "real" not in (x.kind, y.kind) else None


def in_type(reader: Elements, arg: Any, index: tuple[Term, ...], dtype: torch.dtype) -> Term:
    """An argument cast to the type in which the call computes."""
    return narrowed(reader.terms, reader.operand(arg, index), dtype_of(arg), dtype)


def _sum(sign: int, turned: bool = False) -> Step:
    def step(reader: Elements, node: Node, index: tuple[Term, ...]) -> Term | None:
        pair = _two(reader, node, index)
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        if pair is None or alpha not in (1, 1.0):
            return None
        x, y = pair[::-1] if turned else pair
        return arithmetic.plus(reader.terms, fake(node).dtype, x, y, sign)

    return step


def _product(reader: Elements, node: Node, index: tuple[Term, ...]) -> Term | None:
    pair = _two(reader, node, index)
    return None if pair is None else arithmetic.times(reader.terms, fake(node).dtype, *pair)


def _quotient(rounded: str | None) -> Step:
    def step(reader: Elements, node: Node, index: tuple[Term, ...]) -> Term | None:
        pair = _two(reader, node, index)
        how: Any = rounded or argument(node, "rounding_mode")
        return None if pair is None else arithmetic.over(reader.terms, fake(node).dtype, *pair, how)

    return step


def _remainder(reader: Elements, node: Node, index: tuple[Term, ...]) -> Term | None:
    pair = _two(reader, node, index)
    return None if pair is None else arithmetic.rest(reader.terms, *pair, truncated=op_name(node) == "fmod")


def _shift(left: bool) -> Step:
    def step(reader: Elements, node: Node, index: tuple[Term, ...]) -> Term | None:
        pair = _two(reader, node, index)
        dtype = fake(node).dtype
        if pair is None or dtype not in (torch.int64, torch.int32):
            return None
        found = arithmetic.shifted(reader.terms, *pair, left=left)
        return found if found is None or not left else kept(reader.terms, found, dtype)

    return step


def _like_argument(arg: Any) -> Any:
    """A stand-in of the argument's type, from which torch tells the type that a comparison is made in."""
    dtype = dtype_of(arg)
    if isinstance(arg, Node) and tensor(arg) is not None:
        return torch.zeros((1,) * min(fake(arg).dim(), 1), dtype=dtype)
    return False if dtype == torch.bool else 0 if dtype == torch.int64 else 0.0


def _compared(name: Comparison) -> Step:
    def step(reader: Elements, node: Node, index: tuple[Term, ...]) -> Term | None:
        common = torch.result_type(*(_like_argument(a) for a in node.args[:2]))
        if common.is_complex:
            return None
        x, y = (in_type(reader, a, index, common) for a in node.args[:2])
        return arithmetic.compared(reader.terms, name, x, y)

    return step


def _logic(name: str) -> Step:
    def step(reader: Elements, node: Node, index: tuple[Term, ...]) -> Term | None:
        t = reader.terms
        if name == "masks" and fake(node).dtype != torch.bool:
            return arithmetic.masked(t, *(in_type(reader, a, index, fake(node).dtype) for a in node.args[:2]))
        operands = [t.as_bool(reader.operand(a, index)) for a in node.args[:2]]
        if name == "not":
            return t.opposite(operands[0]) if fake(node).dtype == torch.bool else None
        if name == "or":
            return t.any(operands) if fake(node).dtype == torch.bool else None
        if name == "xor":
            x, y = operands
            return t.opposite(t.equal(x, y)) if fake(node).dtype == torch.bool else None
        return t.every(operands)

    return step


def _chosen(reader: Elements, node: Node, index: tuple[Term, ...]) -> Term | None:
    if len(node.args) != 3:
        return None
    t = reader.terms
    first, second, third = node.args
    condition, x, y = (first, second, third) if op_name(node) == "where" else (second, third, first)
    taken = t.as_bool(reader.operand(condition, index))
    if taken is t.true:
        return _like(reader, node, x, index)
    if taken is t.false:
        return _like(reader, node, y, index)
    return t.choose(taken, *(_like(reader, node, v, index) for v in (x, y)))


def _like(reader: Elements, node: Node, arg: Any, index: tuple[Term, ...]) -> Term:
    """One branch of a choice, in the type of the result."""
    dtype = fake(node).dtype
    if dtype.is_complex:
        return reader.operand(arg, index)
    return like(reader.terms, dtype, in_type(reader, arg, index, dtype))


def _clamped(reader: Elements, node: Node, index: tuple[Term, ...]) -> Term | None:
    name = op_name(node)
    low: Any = argument(node, "min") if name != "clamp_max" else None
    high: Any = argument(node, "max") if name != "clamp_min" else None
    t = reader.terms
    dtype = fake(node).dtype
    x = t.as_int(in_type(reader, node.args[0], index, dtype))
    for bound, pick in ((low, t.maximum), (high, t.minimum)):
        if bound is None:
            continue
        limit = t.as_int(in_type(reader, bound, index, dtype))
        if "real" in (x.kind, limit.kind):
            return None
        x = pick(x, limit)
    return x


def _extreme(largest: bool) -> Step:
    def step(reader: Elements, node: Node, index: tuple[Term, ...]) -> Term | None:
        if len(node.args) < 2 or not isinstance(node.args[1], Node) or tensor(node.args[1]) is None:
            return None
        x, y = (in_type(reader, a, index, fake(node).dtype) for a in node.args[:2])
        return arithmetic.extreme(reader.terms, x, y, largest=largest)

    return step


def _absolute(reader: Elements, node: Node, index: tuple[Term, ...]) -> Term | None:
    found = arithmetic.absolute(reader.terms, reader.operand(node.args[0], index))
    return None if found is None else kept(reader.terms, found, fake(node).dtype)


def _negative(reader: Elements, node: Node, index: tuple[Term, ...]) -> Term | None:
    x = reader.terms.as_int(reader.operand(node.args[0], index))
    found = reader.terms.negative(x)
    return kept(reader.terms, found, fake(node).dtype) if x.kind == "int" else found


def _whole(reader: Elements, node: Node, index: tuple[Term, ...]) -> Term | None:
    """Rounding what is whole already."""
    x = reader.operand(node.args[0], index)
    return x if x.kind == "int" else None


def _relu(reader: Elements, node: Node, index: tuple[Term, ...]) -> Term | None:
    x = reader.operand(node.args[0], index)
    return reader.terms.maximum(x, reader.terms.number(0)) if x.kind == "int" else None


POINTWISE: dict[str, Step] = {
    **dict.fromkeys(("to", "_to_copy", "type_as", "float", "half", "bfloat16", "double", "long", "int", "bool"), _cast),
    "add": _sum(1),
    "sub": _sum(-1),
    "subtract": _sum(-1),
    "rsub": _sum(-1, turned=True),
    "mul": _product,
    "multiply": _product,
    "div": _quotient(None),
    "true_divide": _quotient(None),
    "divide": _quotient(None),
    "floor_divide": _quotient("floor"),
    "remainder": _remainder,
    "fmod": _remainder,
    **dict.fromkeys(("bitwise_right_shift", "__rshift__"), _shift(False)),
    **dict.fromkeys(("bitwise_left_shift", "__lshift__"), _shift(True)),
    **dict.fromkeys(("le", "less_equal"), _compared("le")),
    **dict.fromkeys(("lt", "less"), _compared("lt")),
    **dict.fromkeys(("ge", "greater_equal"), _compared("ge")),
    **dict.fromkeys(("gt", "greater"), _compared("gt")),
    "eq": _compared("eq"),
    **dict.fromkeys(("ne", "not_equal"), _compared("ne")),
    **dict.fromkeys(("logical_and",), _logic("and")),
    **dict.fromkeys(("bitwise_and", "__and__"), _logic("masks")),
    **dict.fromkeys(("logical_or", "bitwise_or", "__or__"), _logic("or")),
    **dict.fromkeys(("logical_xor", "bitwise_xor", "__xor__"), _logic("xor")),
    **dict.fromkeys(("logical_not", "bitwise_not"), _logic("not")),
    **dict.fromkeys(("where", "masked_fill"), _chosen),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), _clamped),
    "maximum": _extreme(True),
    "minimum": _extreme(False),
    "abs": _absolute,
    "neg": _negative,
    **dict.fromkeys(("floor", "ceil", "round", "trunc"), _whole),
    "relu": _relu,
}
