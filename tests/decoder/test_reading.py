"""ONNX graphs read as terms: every operator as ONNX's reference computes it. What masks are read as: `test_masks`."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from fxfuse.decoder.reading.reader import Reader
from fxfuse.proof.positions.terms import Terms, Unreadable, value_of

SIZES = [(1, 1), (2, 3), (3, 2), (5, 7), (4, 12)]
OPERATOR = """<ir_version: 10, opset_import: ["" : 24]>
g (int64[M, N] x) => (int64[K] y)
    <int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64 three = {3}, int64 seven = {7}, int64 minus = {-1},
     int64[1] first = {0}, int64[1] second = {1}, int64[1] third = {2}, int64[1] last = {-1}, int64[2] both = {0, 1},
     int64[1] end = {9223372036854775807}, int64[1] lowest = {-9223372036854775807}, float half = {0.5},
     int64[6] table = {5, 3, 8, 1, 1, 2}, int64[4] around = {1, 0, 2, 1}>
{
    m1 = Shape <start = 0, end = 1> (x)
    n1 = Shape <start = 1> (x)
    m = Squeeze (m1)
    n = Squeeze (n1)
    rows = Range (zero, m, one)
    columns = Range (zero, n, one)
    column = Unsqueeze (rows, second)
    BODY
}"""
BODIES = {
    "Range": "y = Range (one, n, two)",
    "Range backwards": "y = Range (n, minus, minus)",
    "Range of floats": "f = Cast <to = 1> (n)\n a = Cast <to = 1> (one)\n y = Range (a, f, a)",
    "Shape": "y = Shape <start = -2> (x)",
    "Size": "y = Size (x)",
    "Gather of sizes": "s = Shape (x)\n y = Gather (s, one)",
    "Slice of sizes": "s = Shape (x)\n y = Slice (s, last, end)",
    "Concat of sizes": "y = Concat <axis = 0> (n1, first, m1)",
    "Constant": "y = Constant <value_ints = [4, -2]> ()",
    "ConstantOfShape": "s = Shape (x)\n y = ConstantOfShape <value = int64[1] {7}> (s)",
    "Expand": "s = Concat <axis = 0> (second, m1, n1)\n y = Expand (column, s)",
    "Reshape apart": "a = Reshape (x, last)\n s = Concat <axis = 0> (m1, n1)\n y = Reshape (a, s)",
    "Reshape with a new axis": "s = Concat <axis = 0> (m1, second, last)\n y = Reshape (x, s)",
    "Reshape of known sizes": "s = Constant <value_ints = [2, 3]> ()\n y = Reshape (table, s)",
    "Reshape with zero": "s = Concat <axis = 0> (first, last, second)\n y = Reshape (x, s)",
    "Transpose": "y = Transpose <perm = [1, 0]> (x)",
    "Cast to bool": "y = Cast <to = 9> (x)",
    "Cast to int8": "w = Mul (x, hundred)\n hundred = Constant <value_int = 100> ()\n y = Cast <to = 3> (w)",
    "Cast to uint8": "y = Cast <to = 2> (x)",
    "Cast to floats": "y = Cast <to = 1> (x)",
    "Add": "y = Add (x, column)",
    "Sub": "y = Sub (x, columns)",
    "Mul": "y = Mul (x, columns)",
    "Mul in int8": "a = Cast <to = 3> (x)\n b = Mul (a, a)\n y = Mul (b, a)",
    "Add in uint8": "a = Cast <to = 2> (x)\n y = Add (a, a)",
    "Div": "y = Div (columns, three)",
    "Mod": "y = Mod (x, three)",
    "fmod": "y = Mod <fmod = 1> (columns, three)",
    "Neg": "y = Neg (x)",
    "Abs": "y = Abs (x)",
    "Min": "y = Min (x, columns, three)",
    "Max": "y = Max (x, column)",
    "Clip": "y = Clip (x, minus, three)",
    "Relu": "a = Cast <to = 1> (x)\n y = Relu (a)",
    "Pow": "y = Pow (x, three)",
    "BitShift right": "a = Cast <to = 13> (columns)\n b = Cast <to = 13> (two)\n"
    ' y = BitShift <direction = "RIGHT"> (a, b)',
    "BitShift left": "a = Cast <to = 2> (columns)\n b = Cast <to = 2> (seven)\n"
    ' y = BitShift <direction = "LEFT"> (a, b)',
    "BitwiseAnd": "y = BitwiseAnd (x, three)",
    "BitwiseNot": "y = BitwiseNot (x)",
    "Where": "c = Less (x, column)\n y = Where (c, x, columns)",
    "Not, And": "a = Less (x, three)\n b = Greater (x, zero)\n c = And (a, b)\n y = Not (c)",
    "Or, Xor": "a = LessOrEqual (x, three)\n b = GreaterOrEqual (x, zero)\n c = Or (a, b)\n y = Xor (c, a)",
    "Equal": "y = Equal (columns, column)",
    "Equal of booleans": "a = Less (x, three)\n b = Less (column, two)\n y = Equal (a, b)",
    "Trilu": "y = Trilu <upper = 0> (x, one)",
    "Trilu above": "y = Trilu <upper = 1> (x, minus)",
    "EyeLike": "y = EyeLike <k = 1, dtype = 9> (x)",
    "CumSum": "s = Shape (x)\n a = ConstantOfShape <value = int64[1] {3}> (s)\n y = CumSum (a, one)",
    "CumSum backwards": "a = Expand (column, s)\n s = Shape (x)\n y = CumSum <exclusive = 1, reverse = 1> (a, one)",
    "Gather": "y = Gather <axis = 1> (x, g)\n g = Sub (columns, one)",
    "Gather from a table": "i = Mod (x, three)\n y = Gather (table, i)",
    "GatherND": "a = Unsqueeze (rows, last)\n z = Mul (a, zero)\n i = Concat <axis = -1> (a, z)\n y = GatherND (x, i)",
    "GatherND in batches": "a = Unsqueeze (rows, last)\n z = Mul (a, zero)\n y = GatherND <batch_dims = 1> (x, z)",
    "GatherElements": "i = Mod (x, one)\n y = GatherElements <axis = 1> (x, i)",
    "Slice": "y = Slice (x, second, end, second)",
    "Slice from the end": "y = Slice (x, last, end, both2)\n both2 = Identity (second)",
    "Slice in steps": "y = Slice (x, first, end, second, third)",
    "Slice backwards": "y = Slice (x, last, lowest, second, last)",
    "Slice up to a size": "y = Slice (x, first, m1, first)",
    "Pad": "y = Pad (x, around, seven)",
    "Pad of a table": "p = Concat <axis = 0> (second, third)\n y = Pad (table, p, minus)",
    "Pad of an axis": "p = Concat <axis = 0> (second, m1)\n y = Pad (x, p, minus, last)",
    "Identity": "y = Identity (x)",
    "Tile": "t = Concat <axis = 0> (second, second)\n y = Tile (x, t)",
    "Tile of one": "c = Concat <axis = 0> (m1, third)\n r = Unsqueeze (table, first)\n y = Tile (r, c)",
    "Squeeze": "a = Unsqueeze (x, both)\n y = Squeeze (a, both)",
    "Unsqueeze": "y = Unsqueeze (x, ends)\n ends = Concat <axis = 0> (first, last)",
    "Concat": "y = Concat <axis = 1> (x, column, x)",
    "Split": "a, y = Split <axis = 0, num_outputs = 2> (table)",
    "Split in parts": "s = Concat <axis = 0> (third, seven2)\n seven2 = Sub (six, third)\n"
    " six = Constant <value_ints = [6]> ()\n a, y = Split (table, s)",
    "ReduceMax": "a = Expand (column, s)\n s = Shape (x)\n y = ReduceMax <keepdims = 0> (a, second)",
    "ReduceMin": "a = Expand (column, s)\n s = Shape (x)\n y = ReduceMin (a, last)",
    "Floor": "a = Cast <to = 1> (x)\n y = Floor (a)",
    "Round of a sum": "a = Cast <to = 1> (x)\n b = Add (a, a)\n y = Round (b)",
}


def ordered(body: str) -> str:
    """The lines of a body, each after those that give what it reads."""
    lines = [line.strip() for line in body.split("\n")]
    names = [{name.strip() for name in line.split(" = ")[0].split(",")} for line in lines]
    result: list[str] = []
    while lines:
        for line, gives in zip(list(lines), list(names), strict=True):
            reads = line.split("(")[-1].rstrip(")").replace(" ", "").split(",")
            if not any(read in other for read in reads for other in names if other is not gives):
                result.append(line)
                lines.remove(line)
                names.remove(gives)
                break
    return "\n    ".join(result)


def element(row: Any, column: Any) -> Any:
    return 3 * row - 2 * column + 1


@pytest.mark.parametrize("name", BODIES)
def test_an_operator_is_read_as_the_reference_computes_it(name: str) -> None:
    proto = onnx.parser.parse_model(OPERATOR.replace("BODY", ordered(BODIES[name])))
    graph = ir.from_proto(proto).graph
    y = graph.outputs[0]
    terms = Terms()
    sizes = {"M": terms.variable("M", 1), "N": terms.variable("N", 1)}

    def given(index: Any) -> Any:
        return terms.add(terms.scale(index[0], 3), terms.scale(index[1], -2), terms.number(1))

    reader = Reader(terms, sizes, {"x": given})
    shape = reader.shape(y)
    index = tuple(reader.place(f"i{axis}", size) for axis, size in enumerate(shape))
    anywhere = known(reader, y, index)
    seen = 0
    for rows, columns in SIZES:
        x = np.array([[element(r, c) for c in range(columns)] for r in range(rows)], np.int64)
        try:
            expected: Any = np.asarray(ReferenceEvaluator(proto).run(None, {"x": x})[0])
        except (IndexError, ValueError):
            continue  # too small for what is picked
        values = {"M": rows, "N": columns}
        assert tuple(value_of(size, values) for size in shape) == expected.shape
        for place in itertools.product(*map(range, expected.shape)):
            here = known(reader, y, tuple(terms.number(n) for n in place))
            at = values | {f"i{axis}": n for axis, n in enumerate(place)}
            found = [value_of(term, at) for term in (here, anywhere) if term is not None]
            assert found and all(value == expected[place] for value in found), (place, found, expected[place])
            seen += 1
    assert seen


def known(reader: Reader, value: ir.Value, index: Any) -> Any:
    """The element, if it can be read for any place or for this one, and no table holds it."""
    try:
        term = reader.read(value, index)
    except Unreadable:
        return None
    return None if any(part.op in ("given", "apply") for part in term.walk()) else term


def test_a_view_that_cannot_be_followed_is_not_read() -> None:
    graph = ir.from_proto(onnx.parser.parse_model(OPERATOR.replace("BODY", "y = Reshape (x, last)"))).graph
    reader = Reader()
    (size,) = reader.shape(graph.outputs[0])
    assert repr(size) == "product(size M, size N)"
    with pytest.raises(Unreadable, match="takes an axis of any length apart"):
        reader.read(graph.outputs[0], (reader.place("i0", size),))


def test_what_is_too_deep_is_not_read() -> None:
    body = "\n".join(f"x{n} = Identity (x{n - 1})" for n in range(1, 2000)).replace("(x0)", "(x)")
    graph = ir.from_proto(onnx.parser.parse_model(OPERATOR.replace("BODY", body + "\ny = Identity (x1999)"))).graph
    with pytest.raises(Unreadable, match="too deep"):
        Reader().shape(graph.outputs[0])
