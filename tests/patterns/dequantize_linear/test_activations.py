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


class Decomposed(nn.Module):
    """What PT2E leaves: operators of `quantized_decomposed` around a product, static or measured as the input comes."""

    def __init__(self, ends: tuple[int, int], kind: torch.dtype, *, measured: bool) -> None:
        super().__init__()
        self.ends, self.kind, self.measured = ends, kind, measured
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("w", torch.randint(-127, 128, (32, 64), generator=generator, dtype=torch.int8))
        self.register_buffer("s", torch.rand(32, generator=generator) * 0.02)
        self.register_buffer("z", torch.zeros(32, dtype=torch.int64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ops, rest = torch.ops.quantized_decomposed, (*self.ends, self.kind)
        weight = ops.dequantize_per_channel(self.w, self.s, self.z, 0, -127, 127, torch.int8)
        if self.measured:
            scale, zero = ops.choose_qparams.tensor(x, *self.ends, 2.0**-12, self.kind)
            read = ops.dequantize_per_tensor.tensor(
                ops.quantize_per_tensor.tensor(x, scale, zero, *rest), scale, zero, *rest
            )
        else:
            read = ops.dequantize_per_tensor(ops.quantize_per_tensor(x, 0.01, 3, *rest), 0.01, 3, *rest)
        return read, read @ weight.t()


@pytest.mark.parametrize("measured", [False, True], ids=["static", "measured"])
@pytest.mark.parametrize(
    ("ends", "kind"),
    [((0, 255), torch.uint8), ((0, 127), torch.uint8), ((-128, 127), torch.int8), ((-127, 127), torch.int8)],
    ids=str,
)
def test_pt2e(tmp_path: Path, ends: tuple[int, int], kind: torch.dtype, measured: bool) -> None:
    """The ends of the range count, whether or not they are the type's: inputs go beyond."""
    pytest.importorskip("torch.ao.quantization.fx._decomposed")
    model = Decomposed(ends, kind, measured=measured).eval()
    inputs = [x * 3 for x in batches()]
    written = exported(model, inputs, tmp_path / "m.onnx")
    assert [n.op_type for n in written.graph].count("QuantizeLinear") == 1
    assert kinds(written, 32 * 64) == ["INT8"]
    assert model(inputs[0])[0].unique().numel() <= ends[1] - ends[0] + 1


def test_float8_weights(tmp_path: Path) -> None:
    model = mlp(bias=True)
    torchao.quantize_(model, torchao.Float8WeightOnlyConfig())
    written = exported(model, batches(), tmp_path / "m.onnx")
    assert kinds(written, 64 * 128) == ["FLOAT8E4M3FN", "FLOAT8E4M3FN"]
