"""What is fused, and what it computes: in PyTorch, in ONNX Runtime through its own function, and written out again."""

from __future__ import annotations

from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxfuse
import fxfuse.onnx
from tests.recognise.outside import operators
from tests.recognise.outside.models import Block, Int8, Mlp, Router

CASES: dict[str, tuple[nn.Module, str, str, int]] = {
    "packed SwiGLU": (Mlp(), "packed_swiglu", "PackedSwiGLU", 1),
    "residual and LayerNorm, both read": (Block(), "add_layer_norm", "AddLayerNorm", 2),
    "residual and LayerNorm, one read": (Block(reads_sum=False), "add_layer_norm", "AddLayerNorm", 2),
    "dequantise and multiply": (Int8(), "int8_linear", "Int8Linear", 1),
    "MoE routing, both read": (Router(), "route", "Route", 1),
    "MoE routing with 3 of 8": (Router(k=3), "route", "Route", 1),
    "MoE routing, weights read": (Router(reads="weights"), "route", "Route", 1),
}
"""Model, operator, its ONNX function, number of inputs."""


def inputs(count: int, batch: int = 2, length: int = 5) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, length, 16) for _ in range(count))


def captured(model: nn.Module, count: int) -> torch.export.ExportedProgram:
    axes = ({0: Dim.AUTO, 1: Dim.AUTO},) * count
    return torch.export.export(model.eval(), inputs(count), dynamic_shapes=axes, strict=False)


def run(onnx_program: torch.onnx.ONNXProgram, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    session = onnxruntime.InferenceSession(onnx_program.model_proto.SerializeToString())
    names = [i.name for i in session.get_inputs()]
    return [torch.tensor(y) for y in session.run(None, {n: t.numpy() for n, t in zip(names, tensors, strict=True)})]


def several(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


@pytest.mark.parametrize("case", CASES)
def test_it_is_one_operator_and_computes_the_same(case: str) -> None:
    model, operator, _, count = CASES[case]
    program = captured(model, count)
    fused = fxfuse.fuse(program)
    assert fxfuse.report(fused).counts == {operator: 1}
    called = [n.target for n in fused.graph.nodes if "fxfuse_outside" in str(n.target)]
    assert called == [getattr(torch.ops.fxfuse_outside, operator).default]
    for shape in ((2, 5), (3, 7)):
        given = inputs(count, *shape)
        for ours, expected in zip(several(fused.module()(*given)), several(model(*given)), strict=True):
            torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_unfuse_writes_it_out_as_the_example_does(case: str) -> None:
    model, _, _, count = CASES[case]
    plain = fxfuse.unfuse(fxfuse.fuse(captured(model, count)))
    assert not any("fxfuse_outside" in str(n.target) for n in plain.graph.nodes)
    given = inputs(count, 3, 7)
    for ours, expected in zip(several(plain.module()(*given)), several(model(*given)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


def in_onnx(case: str, onnx_program: torch.onnx.ONNXProgram) -> None:
    """One node of the user's domain, whose function the model carries; ONNX Runtime gives what eager gives."""
    model, _, function, count = CASES[case]
    nodes = [n for n in onnx_program.model.graph if n.domain == operators.DOMAIN]
    assert [n.op_type for n in nodes] == [function]
    assert (operators.DOMAIN, function, "") in onnx_program.model.functions
    onnx.checker.check_model(onnx_program.model_proto, full_check=True)
    for shape in ((2, 5), (3, 7)):
        given = inputs(count, *shape)
        for ours, expected in zip(run(onnx_program, given), several(model(*given)), strict=True):
            torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_fxfuse_exports_it_as_a_call_of_its_function(case: str) -> None:
    model, _, _, count = CASES[case]
    axes = ({0: Dim.AUTO, 1: Dim.AUTO},) * count
    in_onnx(case, fxfuse.onnx.export(model.eval(), inputs(count), dynamic_shapes=axes))


@pytest.mark.parametrize("case", CASES)
def test_so_does_torch_under_the_plugin(case: str) -> None:
    model, _, _, count = CASES[case]
    axes = ({0: Dim.AUTO, 1: Dim.AUTO},) * count
    with fxfuse.onnx.enabled():
        exported = torch.onnx.export(
            model.eval(), inputs(count), dynamic_shapes=axes, dynamo=True, opset_version=24, verbose=False
        )
    assert exported is not None
    in_onnx(case, exported)
