"""Scaled queries in the place of scaled scores: the same attention, and only where that is sure."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from fxfuse.decoder.scaled_query import scale_queries
from fxfuse.parity import require_onnxruntime

B, HEADS, GROUPS, SIZE, PAST = 2, 6, 2, 16, 5


def attention(new: int, rank: int, mask: str, dtype: ir.DataType = ir.DataType.FLOAT, **attributes: Any) -> ir.Model:
    """Two layers that share their queries, [B, S, H·D] or [B, H, S, D], with a past."""

    def value(name: str, *shape: Any, kind: ir.DataType = dtype) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))

    def heads(name: str, count: int) -> ir.Value:
        return value(name, B, new, count * SIZE) if rank == 3 else value(name, B, count, new, SIZE)

    if rank == 3:
        attributes |= {"q_num_heads": HEADS, "kv_num_heads": GROUPS}
    kind = ir.DataType.BOOL if mask == "bool" else dtype
    inputs = [
        heads("q", HEADS),
        heads("k", GROUPS),
        heads("v", GROUPS),
        value("mask", B, 1, new, PAST + new, kind=kind),
    ]
    inputs += [value(name, B, GROUPS, PAST, SIZE) for name in ("past_key", "past_value")]
    nodes = [ir.node("Attention", inputs, attributes, num_outputs=3) for _ in range(2)]
    outputs = [node.outputs[i] for node in nodes for i in range(3)]
    for i, output in enumerate(outputs):
        output.name, output.type = f"output_{i}", ir.TensorType(dtype)
        output.shape = inputs[0].shape if i % 3 == 0 else ir.Shape([B, GROUPS, PAST + new, SIZE])
    return ir.Model(ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 24}), ir_version=10)


def feeds(model: ir.Model) -> dict[str, np.ndarray]:
    """Random, with two masked keys in the second row."""
    random = np.random.default_rng(0)
    result = {}
    for value in model.graph.inputs:
        assert value.name is not None and value.shape is not None
        result[value.name] = random.standard_normal(value.shape.numpy(), np.float32)
    seen = np.ones(result["mask"].shape, bool)
    seen[1, :, :, :2] = False
    biased = model.graph.inputs[3].dtype != ir.DataType.BOOL
    result["mask"] = np.where(seen, np.float32(0.5), np.finfo(np.float32).min) if biased else seen
    return result


def run(model: ir.Model, inputs: dict[str, np.ndarray]) -> list[Any]:
    ort = require_onnxruntime()
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: list[Any] = session.run(None, inputs)
    return outputs


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.3}, {"scale": 0.3, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("mask", ["bool", "float"])
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("new", [1, 3])
def test_the_same_attention(new: int, rank: int, mask: str, attributes: dict[str, Any]) -> None:
    model = attention(new, rank, mask, **attributes)
    inputs = feeds(model)
    expected = run(model, inputs)
    assert scale_queries(model) == 2
    operators = [node.op_type for node in model.graph]
    assert operators == ["Mul", "Attention", "Attention"], "what two layers share is scaled once"
    assert {node.attributes["scale"].as_float() for node in model.graph if node.op_type == "Attention"} == {1.0}
    for actual, wanted in zip(run(model, inputs), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)
    assert scale_queries(model) == 0, "once is enough"


def test_half_precision_is_left_alone() -> None:
    model = attention(1, 4, "bool", ir.DataType.FLOAT16)
    assert scale_queries(model) == 0
    assert [node.op_type for node in model.graph] == ["Attention", "Attention"]


def test_a_size_that_is_not_known() -> None:
    model = attention(1, 4, "bool")
    for value in model.graph.inputs[:2]:
        value.shape = ir.Shape([B, None, 1, "size"])
    assert scale_queries(model) == 0, "the default scale is 1/sqrt(size)"
