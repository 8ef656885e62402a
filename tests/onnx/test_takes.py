"""The table of what operators take: asked of onnx and ONNX Runtime again; and what it is for."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxfuse.onnx
from fxfuse.errors import FxfuseError
from fxfuse.onnx.translate.takes import TYPES, bfloat16_kernels, check_taken, operators
from fxfuse.parity import require_onnxruntime
from fxfuse.parity.ort import onnxruntime_outputs

OPERATORS = operators()
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "RMSNormalization": ((2, 8), (8,)),
    "LayerNormalization": ((2, 8), (8,), (8,)),
    "RotaryEmbedding": ((2, 4, 5, 8), (2, 5, 4), (2, 5, 4)),
    "Attention": ((2, 4, 5, 8),) * 3,
    "TensorScatter": ((2, 4, 9, 8), (2, 4, 5, 8)),
}


def model_of(operator: str, kinds: list[ir.DataType], shapes: tuple[tuple[int, ...], ...]) -> ir.Model:
    """One node on inputs of these types and shapes."""
    values = [
        ir.Value(name=f"x{i}", type=ir.TensorType(kind), shape=ir.Shape(shape))
        for i, (kind, shape) in enumerate(zip(kinds, shapes, strict=True))
    ]
    attributes = {"axis": 2} if operator == "TensorScatter" else {"perm": [1, 0]} if operator == "Transpose" else {}
    node = ir.node(operator, values, attributes)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(kinds[0])
    return ir.Model(ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 24}), ir_version=10)


def loads(model: ir.Model) -> bool:
    ort = require_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:
        return False
    return True


@pytest.mark.parametrize("operator", OPERATORS)
def test_types_are_those_of_the_definition_and_of_onnx_runtime(operator: str) -> None:
    from onnx import defs

    schema = defs.get_schema(operator, 24)
    kinds = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    allowed = kinds[schema.inputs[0].type_str]
    known = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float", "float64": "double"}
    assert OPERATORS[operator]["types"] == [name for name, onnx in known.items() if f"tensor({onnx})" in allowed]
    shapes = SHAPES[operator]
    assert OPERATORS[operator]["onnxruntime_cpu"] == [
        name for name, (kind, _) in TYPES.items() if loads(model_of(operator, [kind] * len(shapes), shapes))
    ]
    names = [i.name for i in schema.inputs]
    assert set(OPERATORS[operator]["alike"]) <= set(names)


UNARY = ["Abs", "Cos", "Exp", "Identity", "Neg", "Sigmoid", "Sign", "Sin", "Softmax", "Sqrt", "Transpose"]
BINARY = ["Add", "Div", "Expand", "Gather", "MatMul", "Mul", "Reshape", "Squeeze", "Sub", "Tile", "Unsqueeze"]
INDEXED = {"Expand": (2,), "Gather": (3,), "Reshape": (2,), "Squeeze": (0,), "Tile": (2,), "Unsqueeze": (1,)}


@pytest.mark.parametrize("operator", UNARY + BINARY)
def test_bfloat16_kernels_are_those_that_onnx_runtime_has(operator: str) -> None:
    kinds, shapes = [ir.DataType.BFLOAT16], [(8, 8)]
    if operator in BINARY:
        kinds.append(ir.DataType.INT64 if operator in INDEXED else ir.DataType.BFLOAT16)
        shapes.append(INDEXED.get(operator, (8, 8)))  # type: ignore[arg-type]
    assert loads(model_of(operator, kinds, tuple(shapes))) == (operator in bfloat16_kernels())


def test_a_type_that_the_operator_does_not_have_is_refused() -> None:
    with pytest.raises(FxfuseError, match="RotaryEmbedding is defined for float16, bfloat16, float32, not for float64"):
        check_taken(model_of("RotaryEmbedding", [ir.DataType.DOUBLE] * 3, SHAPES["RotaryEmbedding"]))


class Rotation(nn.Module):
    """In float64, by tables in `kind`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        angle = torch.outer(torch.arange(64.0), 10000 ** (-torch.arange(0, 16, 2) / 16)).double()
        self.register_buffer("cos", torch.cat([angle.cos()] * 2, -1))
        self.register_buffer("sin", torch.cat([angle.sin()] * 2, -1))
        self.register_buffer("turn", torch.polar(torch.ones_like(angle), angle))

    def forward(self, x: Tensor) -> Tensor:
        length, x64 = x.shape[2], x.double()
        if self.kind == "complex":
            pairs = torch.view_as_complex(x64.reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * self.turn[:length]).flatten(3).to(x.dtype)
        a, b = x64.chunk(2, -1)
        return (x64 * self.cos[:length] + torch.cat([-b, a], -1) * self.sin[:length]).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["real", "complex"])
def test_rotations_in_float64_are_written_out(kind: str, dtype: torch.dtype) -> None:
    model = Rotation(kind).eval()
    axes = ({0: Dim.AUTO, 2: Dim.AUTO},)
    captured = torch.export.export(model, (torch.randn(2, 4, 12, 16, dtype=dtype),), dynamic_shapes=axes)
    fused = fxfuse.fuse(captured, frozen=True)
    program = fxfuse.onnx.export(fused)
    assert fxfuse.report(fused).counts == {"RotaryEmbedding": 1}, "PyTorch takes it"
    (entry,) = fxfuse.report(program).decomposed()
    assert "not for float64: it is written out" in (entry.reason or "")
    x = torch.randn(1, 4, 9, 16, dtype=dtype)
    torch.testing.assert_close(onnxruntime_outputs(program, (x,))[0], model(x), rtol=1e-6, atol=1e-6)
    with fxfuse.onnx.enabled():
        plugin = torch.onnx.export(captured, dynamo=True, opset_version=24, verbose=False)
    assert plugin is not None
    torch.testing.assert_close(onnxruntime_outputs(plugin, (x,))[0], model(x), rtol=1e-6, atol=1e-6)
