"""fxfuse::dequantize_linear: the official ONNX node tests, on the operator and on the node that it is exported as."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx.backend.test.case import node as onnx_node_cases
from torch import Tensor

import fxfuse.ops  # noqa: F401
from fxfuse.errors import FxfuseError
from fxfuse.onnx.translate.packed import pack_integers
from fxfuse.ops.registry import translation_table

ops = torch.ops.fxfuse
CARRIED = {
    np.dtype(ml_dtypes.int4): torch.int8,
    np.dtype(ml_dtypes.uint4): torch.uint8,
    np.dtype(ml_dtypes.int2): torch.int8,
    np.dtype(ml_dtypes.uint2): torch.uint8,
    np.dtype(ml_dtypes.float8_e4m3fn): torch.float8_e4m3fn,
    np.dtype(ml_dtypes.float8_e5m2): torch.float8_e5m2,
}
"""What PyTorch has no arithmetic for, and the type that it is carried in."""


class Case(NamedTuple):
    name: str
    kind: str
    """ONNX's type of the integers."""
    inputs: list[Tensor]
    attributes: dict[str, int]
    expected: np.ndarray


def to_torch(given: Any) -> Tensor:
    array = onnx.numpy_helper.to_array(given) if isinstance(given, onnx.TensorProto) else np.asarray(given)
    carried = CARRIED.get(array.dtype)
    if carried is None:
        return torch.from_numpy(array)
    if carried.is_floating_point:
        return torch.from_numpy(array.view(np.uint8)).view(carried)
    return torch.from_numpy(array.astype(str(carried).removeprefix("torch.")))


def load() -> list[Case]:
    importlib.import_module("onnx.backend.test.case.node.dequantizelinear")
    cases = []
    for raw in onnx_node_cases._NodeTestCases:
        nodes = raw.model.graph.node
        if len(nodes) != 1 or nodes[0].op_type != "DequantizeLinear" or "float4" in raw.name:
            continue
        given, (expected,) = raw.data_sets[0]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in nodes[0].attribute}
        kind = onnx.TensorProto.DataType.Name(raw.model.graph.input[0].type.tensor_type.elem_type)
        name = raw.name.removeprefix("test_dequantizelinear").lstrip("_") or "one"
        cases.append(Case(name, kind, [to_torch(g) for g in given], attributes, expected))
    return cases


CASES = load()


def test_cases_are_all_there() -> None:
    assert len(CASES) == 13  # all but float4e2m1, which PyTorch cannot compute with


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_torch_operator(case: Case) -> None:
    y = ops.dequantize_linear(*case.inputs, **case.attributes)
    np.testing.assert_array_equal(y.numpy(), case.expected)
    assert y.numpy().dtype == case.expected.dtype


class Kept(torch.nn.Module):
    """The call with everything kept by the model, as weights are."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.attributes = case.attributes
        for place, tensor in enumerate(case.inputs):
            self.register_buffer(f"b{place}", tensor)
        self.count = len(case.inputs)

    def forward(self, one: Tensor) -> Tensor:
        return ops.dequantize_linear(*(getattr(self, f"b{i}") for i in range(self.count)), **self.attributes) * one


@pytest.mark.parametrize("case", [c for c in CASES if not c.kind.endswith("INT2")], ids=lambda case: case.name)
def test_exported_node(case: Case) -> None:
    """One node, its integers of the very type that the case has, and the same numbers in ONNX Runtime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    one = torch.ones((), dtype=torch.from_numpy(case.expected).dtype)
    program = torch.onnx.export(
        Kept(case).eval(),
        (one,),
        dynamo=True,
        opset_version=24,
        custom_translation_table=translation_table(24),
        verbose=False,
    )
    assert program is not None
    pack_integers(program.model)
    (node,) = (n for n in program.model.graph if n.op_type == "DequantizeLinear")
    narrow = case.kind in ("INT4", "UINT4")
    assert node.inputs[0].dtype.name == case.kind or not narrow
    assert not narrow or node.inputs[0].const_value.nbytes == -(-case.inputs[0].numel() // 2)
    onnx.checker.check_model(program.model_proto, full_check=True)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: one.numpy()})
    np.testing.assert_array_equal(y, case.expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 8, dtype=torch.int64)}, "x is torch.int64"),
        ({"x_scale": torch.ones(4, 2, dtype=torch.int8)}, "no floating-point type"),
        ({"x_scale": torch.ones(4, 3), "x_zero_point": None}, "x_scale must be"),
        ({"x_zero_point": torch.zeros(4, 2, dtype=torch.uint8)}, "x_zero_point is torch.uint8"),
        ({"x_zero_point": torch.zeros(2, 2, dtype=torch.int8)}, "x_zero_point is"),
        ({"axis": 2}, "axis 2 is no dimension"),
        ({"block_size": -1}, "must not be negative"),
        ({"output_dtype": 3}, "3 is no ONNX floating-point type"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "x": torch.zeros(4, 8, dtype=torch.int8),
        "x_scale": torch.ones(4, 2),
        "x_zero_point": torch.zeros(4, 2, dtype=torch.int8),
        "axis": 1,
        "block_size": 4,
    }
    ops.dequantize_linear(**given)
    with pytest.raises(FxfuseError, match=message):
        ops.dequantize_linear(**(given | change))


def test_half_precision_is_rounded_once() -> None:
    """From the product in float32: a scale in float16 times an integer of 9 bits is exact there."""
    x = torch.arange(-128, 128, dtype=torch.int8).reshape(16, 16)
    scale = torch.rand(16, generator=torch.Generator().manual_seed(0)).half()
    y = ops.dequantize_linear(x, scale, torch.full((16,), 100, dtype=torch.int8), axis=0)
    torch.testing.assert_close(y, ((x.double() - 100) * scale.double()[:, None]).half(), rtol=0, atol=0)
