"""What a value of a graph can hold is never more than is said of it."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest

from fxfuse.onnx.translate.intervals import ANYTHING, Numbers, holds, of_array

LOWEST = np.finfo(np.float32).min


def reader(op: str, *inputs: ir.Value, to: ir.DataType = ir.DataType.FLOAT) -> tuple[ir.Node, int]:
    """Where the result of `op` is read."""
    node = ir.node(op, inputs, {"to": to} if op == "Cast" else {})
    node.outputs[0].type = ir.TensorType(to)
    return ir.node("Relu", node.outputs), 0


def constant(*numbers: float, dtype: type = np.float32) -> ir.Value:
    tensor = ir.tensor(np.array(numbers, dtype))
    return ir.val("constant", tensor.dtype, tensor.shape, const_value=tensor)


def unknown(kind: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name="x", type=ir.TensorType(kind))


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Max", "Min"])
def test_every_result_lies_in_the_intervals(op: str) -> None:
    functions = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Max": np.maximum, "Min": np.minimum}
    random = np.random.default_rng(0)
    for count in (1, 3, 40):
        for size in (1e-6, 1.0, 1e30, LOWEST):
            one, two = (random.standard_normal((2, count)).clip(-1, 1) * size).astype(np.float32)
            one[0] = LOWEST if count > 1 else one[0]
            found = Numbers().at(reader(op, constant(*one), constant(*two)))
            with np.errstate(all="ignore"):
                results = functions[op](one[:, None], two).reshape(-1)
            assert all(holds(found, float(number)) for number in results)


def test_what_is_known_of_casts_and_choices() -> None:
    seen = Numbers()
    assert seen.at(reader("Cast", unknown(ir.DataType.BOOL))) == {(0.0, 0.0), (1.0, 1.0)}
    assert not holds(seen.at(reader("Cast", unknown(ir.DataType.INT64))), float(LOWEST))
    assert not holds(seen.at(reader("Cast", unknown(ir.DataType.FLOAT16))), float(LOWEST))
    assert holds(seen.at(reader("Cast", unknown(ir.DataType.FLOAT16))), -math.inf)
    assert seen.at(reader("Cast", unknown(ir.DataType.DOUBLE))) == ANYTHING
    chosen = reader("Where", unknown(ir.DataType.BOOL), constant(0.0), constant(LOWEST))
    assert seen.at(chosen) == {(0.0, 0.0), (float(LOWEST), float(LOWEST))}
    assert not holds(seen.at(reader("Clip", unknown(), constant(-1e30))), float(LOWEST))
    assert seen.at(reader("Sqrt", constant(1.0))) == ANYTHING
    assert seen.at(reader("Mul", constant(0.0), unknown())) == ANYTHING, "of infinity it is nan"


def test_arrays() -> None:
    assert of_array(None) == of_array(np.array([np.nan, 1.0])) == ANYTHING
    assert of_array(np.array([], np.float32)) == frozenset()
    far = np.arange(100.0)
    far[:2] = -1e300, -math.inf
    assert of_array(far) == {(-math.inf, -math.inf), (-1e300, 99.0)}
