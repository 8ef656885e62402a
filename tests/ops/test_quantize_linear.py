"""fxfuse::quantize_linear: the official ONNX node tests, on the operator and on the node that it is exported as."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.backend.test.case import node as onnx_node_cases
from torch import Tensor

import fxfuse.ops  # noqa: F401
from fxfuse.errors import FxfuseError
from fxfuse.ops.quantize_linear import CARRIED
from fxfuse.ops.registry import translation_table
from tests.ops.test_dequantize_linear import Case, to_torch

ops = torch.ops.fxfuse


def load() -> list[Case]:
    importlib.import_module("onnx.backend.test.case.node.quantizelinear")
    cases = []
    for raw in onnx_node_cases._NodeTestCases:
        nodes = raw.model.graph.node
        if len(nodes) != 1 or nodes[0].op_type != "QuantizeLinear" or "float4" in raw.name:
            continue
        given, (expected,) = raw.data_sets[0]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in nodes[0].attribute}
        number = raw.model.graph.output[0].type.tensor_type.elem_type
        if number in CARRIED:  # a byte says nothing of it
            attributes["output_dtype"] = number
        name = raw.name.removeprefix("test_quantizelinear").lstrip("_") or "one"
        kind = onnx.TensorProto.DataType.Name(number)
        cases.append(Case(name, kind, [to_torch(g) for g in given], attributes, expected))
    return cases


CASES = load()


def bits(values: Any) -> np.ndarray:
    """Numbers of float8 by their bits, for PyTorch compares none."""
    tensor = values if isinstance(values, Tensor) else to_torch(values)
    return (tensor.view(torch.uint8) if tensor.dtype.is_floating_point else tensor).numpy()


def test_cases_are_all_there() -> None:
    assert len(CASES) == 12  # all but float4e2m1, which PyTorch cannot compute with


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_torch_operator(case: Case) -> None:
    y = ops.quantize_linear(*case.inputs, **case.attributes)
    np.testing.assert_array_equal(bits(y), bits(case.expected))


class Call(torch.nn.Module):
    """The call, its scales and zero points kept by the model."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.attributes = case.attributes
        self.rest = len(case.inputs) - 1
        for place, tensor in enumerate(case.inputs[1:]):
            self.register_buffer(f"b{place}", tensor)

    def forward(self, x: Tensor) -> Tensor:
        return ops.quantize_linear(x, *(getattr(self, f"b{i}") for i in range(self.rest)), **self.attributes)


@pytest.mark.parametrize("case", [c for c in CASES if not c.kind.endswith("INT2")], ids=lambda case: case.name)
def test_exported_node(case: Case) -> None:
    """One node, which gives the very type that the case has, and the same numbers in ONNX Runtime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    program = torch.onnx.export(
        Call(case).eval(),
        (case.inputs[0],),
        dynamo=True,
        opset_version=24,
        custom_translation_table=translation_table(24),
        verbose=False,
    )
    assert program is not None
    (node,) = (n for n in program.model.graph if n.op_type != "Cast")
    assert node.op_type == "QuantizeLinear" and node.outputs[0].dtype.name == case.kind
    assert len(program.model.graph) == (1 if case.attributes.get("output_dtype") not in CARRIED else 2)
    onnx.checker.check_model(program.model_proto, full_check=True)
    if case.kind.startswith("FLOAT8"):
        return  # its Python interface gives no such tensors
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": case.inputs[0].numpy()})
    np.testing.assert_array_equal(y, bits(case.expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 8, dtype=torch.int8)}, "x is torch.int8"),
        ({"y_scale": torch.ones(4, 2, dtype=torch.int8)}, "no floating-point type"),
        ({"y_scale": torch.ones(4, 3), "y_zero_point": None}, "y_scale must be"),
        ({"y_zero_point": torch.zeros(4, 2, dtype=torch.int64)}, "y_zero_point is torch.int64"),
        ({"output_dtype": 2}, "output_dtype says torch.uint8"),
        ({"output_dtype": 7}, "7 is no type"),
        ({"axis": 2}, "axis 2 is no dimension"),
        ({"precision": 3}, "3 is no ONNX floating-point type"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "x": torch.zeros(4, 8),
        "y_scale": torch.ones(4, 2),
        "y_zero_point": torch.zeros(4, 2, dtype=torch.int8),
        "axis": 1,
        "block_size": 4,
    }
    ops.quantize_linear(**given)
    with pytest.raises(FxfuseError, match=message):
        ops.quantize_linear(**(given | change))


def test_halves_and_ends() -> None:
    x = torch.tensor([-3.5, -2.5, -0.5, 0.5, 1.5, 2.5, 1e30, -1e30, float("inf")])
    y = ops.quantize_linear(x, torch.tensor(1.0), torch.tensor(0, dtype=torch.int8))
    assert y.tolist() == [-4, -2, 0, 0, 2, 2, 127, -128, 127]
    assert not ops.quantize_linear(x.requires_grad_(), torch.tensor(1.0)).requires_grad
