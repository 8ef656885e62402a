"""Activations that are quantised as they come: products of integers stay such, and the numbers are eager's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfuse.onnx.translate.missing import missing_translations
from tests.patterns.dequantize_linear.models import mlp
from tests.patterns.dequantize_linear.test_exported import batches, exported, kinds

pytest.importorskip("onnxruntime")
torchao = pytest.importorskip("torchao.quantization")


@pytest.mark.parametrize("shape", [(64,), (5, 64)], ids=["rows", "a batch of rows"])
def test_int8_by_int8(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """torchao's products of integers, in a form for which ONNX Runtime has a kernel: activations without a sign."""
    model = mlp(bias=True)
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    written = exported(model, batches(torch.float32, *shape), tmp_path / "m.onnx")
    nodes = [n for n in written.graph if n.op_type == "MatMulInteger"]
    assert [n.inputs[0].dtype.name for n in nodes] == ["UINT8", "UINT8"]
    assert kinds(written, 64 * 128) == ["INT8", "INT8"]


def test_every_integer_of_the_product() -> None:
    """-128 by -128, a thousand times, is the largest sum; the result is the integer itself."""
    onnxruntime = pytest.importorskip("onnxruntime")

    class Product(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch._int_mm(a, b)

    every = torch.arange(-128, 128, dtype=torch.int8)
    a = torch.stack([every.repeat(4), torch.full((1024,), -128, dtype=torch.int8)] * 16)
    b = torch.stack([every.repeat(4), torch.full((1024,), -128, dtype=torch.int8)] * 8, 1)
    captured = torch.export.export(Product(), (a, b))
    table = missing_translations(captured.graph.nodes)
    program = torch.onnx.export(captured, dynamo=True, opset_version=24, custom_translation_table=table, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"a": a.numpy(), "b": b.numpy()})
    assert torch.equal(torch.from_numpy(y), torch._int_mm(a, b))


def configured(name: str) -> Any:
    group = torchao.PerGroup(32)
    return {
        "int8 activations, int4 weights": lambda: torchao.Int8DynamicActivationInt4WeightConfig(group_size=32),
        "the same, of any bits": lambda: torchao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=group
        ),
    }[name]()


@pytest.mark.parametrize("name", ["int8 activations, int4 weights", "the same, of any bits"])
def test_int4_weights(tmp_path: Path, name: str) -> None:
    model = mlp(bias=True)
    torchao.quantize_(model, configured(name))
    written = exported(model, batches(), tmp_path / "m.onnx")
    assert kinds(written, 64 * 128) == ["INT4", "INT4"]


def test_torchtunes_training(tmp_path: Path) -> None:
    """Prepared, trained for some steps, converted: zero points are kept in float32, and hold integers."""
    tune = pytest.importorskip("torchtune.training.quantization")
    quantizer = tune.Int8DynActInt4WeightQATQuantizer(groupsize=32)
    model = quantizer.prepare(mlp().train())
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 64, generator=generator)).square().mean().backward()
        optimizer.step()
    model = quantizer.convert(model).eval()
    written = exported(model, batches(), tmp_path / "m.onnx")
    assert kinds(written, 64 * 128) == ["INT4", "INT4"]


def test_torchtunes_quantizer(tmp_path: Path) -> None:
    tune = pytest.importorskip("torchtune.training.quantization")
    model = tune.Int8DynActInt4WeightQuantizer(groupsize=32).quantize(mlp())
    written = exported(model, batches(), tmp_path / "m.onnx")
    assert kinds(written, 64 * 128) == ["INT4", "INT4"]
