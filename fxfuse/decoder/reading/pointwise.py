"""How `reader.py` reads operators of ONNX that compute element by element. None means that the step would not be
exact."""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir
import torch

from fxfuse.decoder.reading.elements import Elements
from fxfuse.proof import arithmetic
from fxfuse.proof.arithmetic import Comparison
from fxfuse.proof.positions.terms import Term, Terms, Unreadable

Operands = tuple[Term, ...]
Step = Callable[[Elements, ir.Node, Operands], "Term | None"]
_INTEGERS = {
    torch.int8: (8, True),
    torch.int16: (16, True),
    torch.int32: (32, True),
    torch.int64: (64, True),
    torch.uint8: (8, False),
    torch.uint16: (16, False),
    torch.uint32: (32, False),
    torch.uint64: (64, False),
}
_FLOATS = {torch.float32: 2**24, torch.float64: 2**53}
"""Up to where a type of floats holds every whole number."""
_LARGEST, _LARGEST_IN_FLOATS = 2**24, 2**20
"""What positions, and whole numbers that inputs hold, are assumed to stay below."""


def reach(term: Term, largest: int = _LARGEST) -> float:
    """A bound on the absolute value of a term of whole numbers, if its variables stay below `largest`."""
    found: float

    def of(part: Term) -> float:
        return reach(part, largest)

    if term.op == "number":
        return abs(float(term.args[0]))
    low, high = term.bounds
    known = max(abs(low), abs(high))
    if term.op == "sum":
        found = abs(term.args[0]) + sum(abs(c) * of(part) for part, c in term.args[1])
    elif term.op == "product":
        found = of(term.args[0]) * of(term.args[1])
    elif term.op == "choose":
        found = max(of(part) for part in term.args[1:])
    elif term.op == "quotient":
        found = of(term.args[0]) / term.args[1] + 1
    else:
        found = 1 if term.kind == "bool" else math.inf if term.op == "apply" else largest
    return min(known, found)


def held(terms: Terms, term: Term | None, dtype: torch.dtype) -> Term | None:
    """A result as its type holds it. Types of whole numbers wrap round; None if a float might not hold it exactly."""
    if term is None or term.kind == "real":
        return term
    if dtype == torch.bool:
        return terms.as_bool(term)
    if dtype in _INTEGERS:
        bits, signed = _INTEGERS[dtype]
        if reach(term) < 2 ** (bits - signed) and (signed or term.bounds[0] >= 0):
            return term
        half = 2 ** (bits - 1) if signed else 0
        return terms.subtract(terms.remainder(terms.add(term, terms.number(half)), 2**bits), terms.number(half))
    exact = reach(term, _LARGEST_IN_FLOATS) <= _FLOATS.get(dtype, 0)
    return term if exact or arithmetic.numbers(term) is not None else None


def _as_it_is(terms: Terms, term: Term, dtype: torch.dtype) -> Term:
    """For arithmetic that would hold each intermediate result in its type: here `held` does so for the whole result."""
    return term


def _result(reader: Elements, node: ir.Node) -> torch.dtype:
    return reader.type(node.outputs[0])


def _whole(reader: Elements, node: ir.Node) -> bool:
    return _result(reader, node) in _INTEGERS


def _folds(combine: Callable[[Terms, torch.dtype, Term, Term], Term | None]) -> Step:
    """The step of an operator that takes two operands or more, from what it does to two."""

    def step(reader: Elements, node: ir.Node, operands: Operands) -> Term | None:
        t, dtype = reader.terms, _result(reader, node)

        found: Term | None = operands[0]
        for operand in operands[1:]:
            found = None if found is None else held(t, combine(t, dtype, found, operand), dtype)
        return found

    return step


def _over(t: Terms, dtype: torch.dtype, x: Term, y: Term) -> Term | None:
    """Div: whole numbers are rounded towards 0. Floats are not divided by 0, for the sign of a 0 is not read."""
    if dtype not in _INTEGERS:
        return None if any(part.number == 0 for part in y.walk()) else arithmetic.over(t, dtype, x, y)
    if not isinstance(y.number, int) or y.number < 1 or x.kind != "int":
        return None
    up = t.negative(t.divide(t.negative(x), y.number))
    return t.choose(t.at_most(t.number(0), x), t.divide(x, y.number), up)


def _mod(reader: Elements, node: ir.Node, operands: Operands) -> Term | None:
    if not _whole(reader, node):
        return None
    return arithmetic.rest(reader.terms, *operands, truncated=bool(node.attributes.get_int("fmod", 0)))


def _power(reader: Elements, node: ir.Node, operands: Operands) -> Term | None:
    x, y = operands
    if not _whole(reader, node) or not isinstance(y.number, int) or not 1 <= y.number <= 8:
        return None
    t, dtype = reader.terms, _result(reader, node)
    found: Term | None = x
    for _ in range(y.number - 1):
        found = None if found is None else held(t, t.multiply(found, x), dtype)
    return found


def _shift(reader: Elements, node: ir.Node, operands: Operands) -> Term | None:
    left = node.attributes.get_string("direction", "") == "LEFT"
    return held(reader.terms, arithmetic.shifted(reader.terms, *operands, left=left), _result(reader, node))


def _bitwise(name: str) -> Step:
    def step(reader: Elements, node: ir.Node, operands: Operands) -> Term | None:
        t = reader.terms
        if name == "and":
            return arithmetic.masked(t, *operands)
        return t.subtract(t.number(-1), operands[0]) if name == "not" and _INTEGERS[_result(reader, node)][1] else None

    return step


def _compared(name: Comparison) -> Step:
    return lambda reader, node, operands: arithmetic.compared(reader.terms, name, *operands)


def _logic(name: str) -> Step:
    def step(reader: Elements, node: ir.Node, operands: Operands) -> Term | None:
        t = reader.terms
        if name == "and":
            return t.every(operands)
        if name == "or":
            return t.any(operands)
        return t.opposite(operands[0] if name == "not" else t.equal(*operands))

    return step


def _chosen(reader: Elements, node: ir.Node, operands: Operands) -> Term | None:
    return arithmetic.chosen(reader.terms, _result(reader, node), *operands)


def _cast(reader: Elements, node: ir.Node, operands: Operands) -> Term | None:
    source = node.inputs[0]
    assert source is not None
    before, after = reader.type(source), _result(reader, node)
    if after in _INTEGERS and operands[0].kind == "real" and not math.isfinite(operands[0].number or 0):
        return None
    if after in _INTEGERS and operands[0].kind != "real":
        return held(reader.terms, reader.terms.as_int(operands[0]), after) if before != after else operands[0]
    found = arithmetic.narrowed(reader.terms, operands[0], before, after)
    exact = found if after not in _FLOATS and after.is_floating_point else held(reader.terms, found, after)
    return exact if before != after else found


def _clip(reader: Elements, node: ir.Node, operands: Operands) -> Term | None:
    """Clip, of whose two bounds either may be left out."""
    t = reader.terms
    found: Term | None = operands[0]
    for number, largest in ((1, True), (2, False)):
        bound = node.inputs[number] if len(node.inputs) > number else None
        if bound is not None and found is not None:
            found = arithmetic.extreme(t, found, reader.operand(bound, ()), largest=largest)
    return found


def _negative(reader: Elements, node: ir.Node, operands: Operands) -> Term | None:
    return held(reader.terms, reader.terms.negative(operands[0]), _result(reader, node))


def _absolute(reader: Elements, node: ir.Node, operands: Operands) -> Term | None:
    return held(reader.terms, arithmetic.absolute(reader.terms, operands[0]), _result(reader, node))


def _rounded(reader: Elements, node: ir.Node, operands: Operands) -> Term | None:
    return operands[0] if operands[0].kind == "int" else None


def _relu(reader: Elements, node: ir.Node, operands: Operands) -> Term | None:
    return arithmetic.extreme(reader.terms, operands[0], reader.terms.number(0), largest=True)


def _is_nan(reader: Elements, node: ir.Node, operands: Operands) -> Term | None:
    if operands[0].kind != "int" and operands[0].number is None:
        raise Unreadable(node.op_type)
    return reader.terms.false


STEPS: dict[str, Step] = {
    "Add": _folds(lambda t, dtype, x, y: arithmetic.plus(t, dtype, x, y, keep=_as_it_is)),
    "Sum": _folds(lambda t, dtype, x, y: arithmetic.plus(t, dtype, x, y, keep=_as_it_is)),
    "Sub": _folds(lambda t, dtype, x, y: arithmetic.plus(t, dtype, x, y, -1, keep=_as_it_is)),
    "Mul": _folds(lambda t, dtype, x, y: arithmetic.times(t, dtype, x, y, keep=_as_it_is)),
    "Div": _folds(_over),
    "Max": _folds(lambda t, dtype, x, y: arithmetic.extreme(t, x, y, largest=True)),
    "Min": _folds(lambda t, dtype, x, y: arithmetic.extreme(t, x, y, largest=False)),
    "Mod": _mod,
    "Pow": _power,
    "BitShift": _shift,
    "BitwiseAnd": _bitwise("and"),
    "BitwiseNot": _bitwise("not"),
    "Less": _compared("lt"),
    "LessOrEqual": _compared("le"),
    "Greater": _compared("gt"),
    "GreaterOrEqual": _compared("ge"),
    "Equal": _compared("eq"),
    "And": _logic("and"),
    "Or": _logic("or"),
    "Xor": _logic("xor"),
    "Not": _logic("not"),
    "Where": _chosen,
    "Cast": _cast,
    "CastLike": _cast,
    "Clip": _clip,
    "Neg": _negative,
    "Abs": _absolute,
    **dict.fromkeys(("Floor", "Ceil", "Round"), _rounded),
    "Relu": _relu,
    "IsNaN": _is_nan,
}
BOOLEAN = {*("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "And", "Or", "Xor", "Not", "IsNaN")}
"""Operators that give booleans."""
