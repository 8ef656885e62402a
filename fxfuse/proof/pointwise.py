"""What elementwise operators do to terms. A step that is not exact is None: it is read as unknown."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from fxfuse.graph.view import argument, fake, op_name, tensor
from fxfuse.proof.terms import Term, Terms

if TYPE_CHECKING:
    from fxfuse.proof.positions import Reader

Step = Callable[["Reader", Node, tuple[Term, ...]], "Term | None"]
_EXACT = 2**53
_LEAVES = 16


def float_number(terms: Terms, value: float) -> Term:
    """A float constant; one that is whole is the whole number."""
    if math.isfinite(value) and value == int(value) and abs(value) < _EXACT:
        return terms.number(int(value))
    return terms.number(float(value))


def _cast(reader: Reader, node: Node, index: tuple[Term, ...]) -> Term | None:
    from fxfuse.proof.positions import narrowed

    source = node.args[0]
    assert isinstance(source, Node)
    return narrowed(reader, reader.operand(source, index), fake(source).dtype, fake(node).dtype)


def of_constants(reader: Reader, node: Node, index: tuple[Term, ...]) -> Term | None:
    """Any operator of one tensor that chooses between constants: computed for each of them."""
    places = [n for n, a in enumerate(node.args) if isinstance(a, Node)]
    if len(places) != 1 or any(isinstance(a, Node) for a in node.kwargs.values()):
        return None
    source: Any = node.args[places[0]]
    if tensor(source) is None or fake(source).dtype.is_complex:
        return None
    term = reader.operand(source, index)
    if _numbers(term) is None or (_numbers(term) or 0) > _LEAVES:
        return None

    def leaf(value: Any, _: Any) -> Term:
        held = torch.tensor(value, dtype=fake(source).dtype)
        args = [held if n == places[0] else a for n, a in enumerate(node.args)]
        result = node.target(*args, **node.kwargs).item()  # type: ignore[operator]
        if value == 0 and held.is_floating_point() and math.isinf(result):
            args[places[0]] = -held
            if node.target(*args, **node.kwargs).item() != result:  # type: ignore[operator]
                raise unreadable(f"{op_name(node)} of zero, which has a sign")
        if isinstance(result, float):
            return float_number(reader.terms, result)
        return reader.terms.number(result)

    return _both(reader, term, reader.terms.number(0), leaf)


def _numbers(term: Term) -> int | None:
    """How many constants a term chooses from; None where it is more than constants."""
    if term.op == "number":
        return 1
    if term.op == "choose":
        x, y = _numbers(term.args[1]), _numbers(term.args[2])
        return None if x is None or y is None else x + y
    return None


def _both(reader: Reader, x: Term, y: Term, combine: Callable[[Any, Any], Term]) -> Term | None:
    """`combine` of constants, through the choices that either of the two makes."""
    counts = _numbers(x), _numbers(y)
    if counts[0] is None or counts[1] is None or counts[0] * counts[1] > _LEAVES:
        return None
    for one, other, left in ((x, y, True), (y, x, False)):
        if one.op == "choose":
            condition, first, second = one.args
            a, b = (_both(reader, *((part, other) if left else (other, part)), combine) for part in (first, second))
            return None if a is None or b is None else reader.terms.choose(condition, a, b)
    return combine(x.args[0], y.args[0])


def _folded(reader: Reader, node: Node, x: Term, y: Term, function: Callable[[Any, Any], Any]) -> Term | None:
    """Constants computed as PyTorch computes them, in the node's own type."""
    dtype = fake(node).dtype

    def combine(a: Any, b: Any) -> Term:
        if b == 0 and op_name(node) in ("div", "true_divide", "divide"):
            raise unreadable("a quotient by zero, which has a sign")
        first, second = (torch.tensor(float(v), dtype=torch.float64).to(dtype) for v in (a, b))
        value = function(first, second).item()
        return float_number(reader.terms, value) if value == value else reader.terms.apply("nan", (), "real")

    return _both(reader, x, y, combine)


def _two(reader: Reader, node: Node, index: tuple[Term, ...]) -> tuple[Term, Term] | None:
    from fxfuse.proof.positions import kind_of

    if len(node.args) < 2:
        return None
    dtype = fake(node).dtype
    if dtype == torch.bool or dtype.is_complex:
        x, y = (reader.operand(a, index) for a in node.args[:2])
        return x, y
    x, y = (in_type(reader, a, index, dtype) for a in node.args[:2])
    return (x, y) if kind_of(dtype) == "real" or "real" not in (x.kind, y.kind) else None


def in_type(reader: Reader, arg: Any, index: tuple[Term, ...], dtype: torch.dtype) -> Term:
    """What a call that works in this type makes of an argument."""
    from fxfuse.proof.positions import dtype_of, narrowed

    return narrowed(reader, reader.operand(arg, index), dtype_of(arg), dtype)


def kept(reader: Reader, term: Term, dtype: torch.dtype) -> Term | None:
    """The result of whole arithmetic in this type; None where it may not be exact."""
    from fxfuse.proof import positions

    return positions.kept(reader, term, dtype)


def unreadable(why: str) -> Exception:
    from fxfuse.proof.positions import Unreadable

    return Unreadable(why)


def _sum(sign: int, turned: bool = False) -> Step:
    def step(reader: Reader, node: Node, index: tuple[Term, ...]) -> Term | None:
        pair = _two(reader, node, index)
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        if pair is None or alpha not in (1, 1.0):
            return None
        x, y = pair[::-1] if turned else pair
        floating = fake(node).dtype.is_floating_point
        if floating and fake(node).dtype not in (torch.float32, torch.float64):
            return None
        if "choose" in (x.op, y.op):
            found = _folded(reader, node, x, y, (lambda a, b: a + b) if sign > 0 else (lambda a, b: a - b))
            if found is not None:
                return found
        if x.kind == y.kind == "int":
            return kept(reader, reader.terms.add(x, y) if sign > 0 else reader.terms.subtract(x, y), fake(node).dtype)
        if y.number == 0:
            return x
        if x.number == 0 and sign > 0:
            return y
        return _folded(reader, node, x, y, (lambda a, b: a + b) if sign > 0 else (lambda a, b: a - b))

    return step


def _product(reader: Reader, node: Node, index: tuple[Term, ...]) -> Term | None:
    pair = _two(reader, node, index)
    return None if pair is None else times(reader, node, *pair)


def times(reader: Reader, node: Node, x: Term, y: Term) -> Term:
    """A product of two elements, whatever call makes it."""
    t = reader.terms
    if fake(node).dtype == torch.bool:
        return t.every([t.as_bool(x), t.as_bool(y)])
    x, y = t.as_int(x), t.as_int(y)
    for one, other in ((x, y), (y, x)):
        if one.op == "apply" and one.args[0] == "neg":
            return t.negative(times(reader, node, one.args[1], other))
        if one.number == 1:
            return other
        if one.number == -1 and other.kind == "real":
            return t.negative(other)
    floating = fake(node).dtype.is_floating_point
    if floating and (found := _folded(reader, node, x, y, lambda a, b: a * b)) is not None:
        return found
    if x.kind == y.kind == "int":
        small = any(v.number is not None and abs(v.number) <= 16 for v in (x, y))
        if not floating or small or _is_gate(x) or _is_gate(y):  # no float holds every product of positions
            exact = kept(reader, t.multiply(x, y), fake(node).dtype)
            if exact is not None:
                return exact
    whole = not floating and not fake(node).dtype.is_complex
    ordered = tuple(sorted((x, y), key=lambda v: v.serial))
    return t.apply(f"product in {fake(node).dtype}", ordered, "int" if whole else "real")


def _is_gate(term: Term) -> bool:
    return term.op == "choose" and {term.args[1].number, term.args[2].number} == {0, 1}


def _quotient(rounded: str | None) -> Step:
    def step(reader: Reader, node: Node, index: tuple[Term, ...]) -> Term | None:
        pair = _two(reader, node, index)
        how = rounded or argument(node, "rounding_mode")
        if pair is None:
            return None
        x, y = pair
        if how is None:
            if y.number == 1:
                return x
            return _folded(reader, node, x, y, lambda a, b: a / b)
        down = how == "floor" or x.bounds[0] >= 0
        exact = x.kind == "int" and isinstance(y.number, int) and y.number > 0
        exact = exact and fake(node).dtype not in (torch.float16, torch.bfloat16)
        return reader.terms.divide(x, y.number) if exact and down else None

    return step


def _remainder(reader: Reader, node: Node, index: tuple[Term, ...]) -> Term | None:
    pair = _two(reader, node, index)
    if pair is None:
        return None
    x, y = pair
    exact = x.kind == "int" and isinstance(y.number, int) and y.number > 0
    if not exact or (op_name(node) == "fmod" and x.bounds[0] < 0):
        return None
    return reader.terms.remainder(x, y.number)


def _shift(left: bool) -> Step:
    def step(reader: Reader, node: Node, index: tuple[Term, ...]) -> Term | None:
        pair = _two(reader, node, index)
        if pair is None or not isinstance(pair[1].number, int) or not 0 <= pair[1].number < 62:
            return None
        by = 2 ** pair[1].number
        wide = fake(node).dtype in (torch.int64, torch.int32)
        if pair[0].kind != "int" or not wide:
            return None
        if not left:
            return reader.terms.divide(pair[0], by)
        return kept(reader, reader.terms.scale(pair[0], by), fake(node).dtype)

    return step


def _like_argument(arg: Any) -> Any:
    """Something of the same type, for torch to say which type both are compared in."""
    from fxfuse.proof.positions import dtype_of

    dtype = dtype_of(arg)
    if isinstance(arg, Node) and tensor(arg) is not None:
        return torch.zeros((1,) * min(fake(arg).dim(), 1), dtype=dtype)
    return False if dtype == torch.bool else 0 if dtype == torch.int64 else 0.0


def _compared(name: str) -> Step:
    def step(reader: Reader, node: Node, index: tuple[Term, ...]) -> Term | None:
        t = reader.terms
        common = torch.result_type(*(_like_argument(a) for a in node.args[:2]))
        if common.is_complex:
            return None
        x, y = (t.as_int(in_type(reader, a, index, common)) for a in node.args[:2])
        at_most, less = t.at_most, t.less
        return {
            "le": lambda: at_most(x, y),
            "lt": lambda: less(x, y),
            "ge": lambda: at_most(y, x),
            "gt": lambda: less(y, x),
            "eq": lambda: t.equal(x, y),
            "ne": lambda: t.opposite(t.equal(x, y)),
        }[name]()

    return step


def _logic(name: str) -> Step:
    def step(reader: Reader, node: Node, index: tuple[Term, ...]) -> Term | None:
        t = reader.terms
        if name == "masks" and fake(node).dtype != torch.bool:
            return _bits(reader, node, index)
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


def _bits(reader: Reader, node: Node, index: tuple[Term, ...]) -> Term | None:
    """x & (2ⁿ - 1) is a remainder."""
    x, y = (in_type(reader, a, index, fake(node).dtype) for a in node.args[:2])
    for number, other in ((x, y), (y, x)):
        mask = number.number
        if isinstance(mask, int) and mask > 0 and (mask + 1) & mask == 0 and other.kind == "int":
            return reader.terms.remainder(other, mask + 1)
    return None


def _chosen(reader: Reader, node: Node, index: tuple[Term, ...]) -> Term | None:
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


def _like(reader: Reader, node: Node, arg: Any, index: tuple[Term, ...]) -> Term:
    """What is chosen takes the type of the result."""
    dtype = fake(node).dtype
    if dtype.is_complex:
        return reader.operand(arg, index)
    term = in_type(reader, arg, index, dtype)
    return term if dtype == torch.bool else reader.terms.as_int(term)


def _clamped(reader: Reader, node: Node, index: tuple[Term, ...]) -> Term | None:
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
    def step(reader: Reader, node: Node, index: tuple[Term, ...]) -> Term | None:
        if len(node.args) < 2 or not isinstance(node.args[1], Node) or tensor(node.args[1]) is None:
            return None
        x, y = (reader.terms.as_int(in_type(reader, a, index, fake(node).dtype)) for a in node.args[:2])
        if "real" in (x.kind, y.kind):
            return None
        return reader.terms.maximum(x, y) if largest else reader.terms.minimum(x, y)

    return step


def _absolute(reader: Reader, node: Node, index: tuple[Term, ...]) -> Term | None:
    x = reader.terms.as_int(reader.operand(node.args[0], index))
    return kept(reader, reader.terms.absolute(x), fake(node).dtype) if x.kind == "int" else None


def _negative(reader: Reader, node: Node, index: tuple[Term, ...]) -> Term | None:
    x = reader.terms.as_int(reader.operand(node.args[0], index))
    return kept(reader, reader.terms.negative(x), fake(node).dtype) if x.kind == "int" else reader.terms.negative(x)


def _whole(reader: Reader, node: Node, index: tuple[Term, ...]) -> Term | None:
    """Rounding what is whole already."""
    x = reader.operand(node.args[0], index)
    return x if x.kind == "int" else None


def _relu(reader: Reader, node: Node, index: tuple[Term, ...]) -> Term | None:
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
    **{name: _compared(name) for name in ("le", "lt", "ge", "gt", "eq", "ne")},
    **{full: _compared(short) for full, short in (("less_equal", "le"), ("less", "lt"), ("greater_equal", "ge"))},
    **{full: _compared(short) for full, short in (("greater", "gt"), ("not_equal", "ne"))},
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
