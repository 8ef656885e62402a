"""Quantised models in ONNX: weights as small as they were, and the same numbers as eager PyTorch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxfuse
import fxfuse.onnx
from tests.patterns.dequantize_linear.models import WAYS, Written, mlp

pytest.importorskip("onnxruntime")
torchao = pytest.importorskip("torchao.quantization")


def quantised(model: nn.Module, bits: torch.dtype, granularity: Any, mapping: str = "SYMMETRIC") -> nn.Module:
    """With torchao's weights in the place of the model's linears and embeddings."""
    from torchao.quantization.quant_primitives import MappingType

    config = torchao.IntxWeightOnlyConfig(weight_dtype=bits, granularity=granularity, mapping_type=MappingType[mapping])
    torchao.quantize_(model, config, filter_fn=lambda module, _: isinstance(module, (nn.Linear, nn.Embedding)))
    return model


def exported(model: nn.Module, inputs: list[Tensor], path: Path, **options: Any) -> ir.Model:
    """The exported model, which computes in ONNX Runtime what eager does for each of the inputs."""
    onnxruntime = pytest.importorskip("onnxruntime")
    program = fxfuse.onnx.export(model, (inputs[0],), path, dynamic_shapes=({0: Dim.AUTO},), **options)
    options = onnxruntime.SessionOptions()
    # Products with these weights are fused, and take activations in 8 bits where they are not told otherwise.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for given in inputs:
        expected = model(given)
        expected = (expected,) if isinstance(expected, Tensor) else expected
        results = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        for ours, theirs in zip(results, expected, strict=True):
            sums = 16 if theirs.dtype == torch.float32 else 4  # of a thousand products, in whatever order
            room = sums * torch.finfo(theirs.dtype).eps * float(theirs.detach().abs().max())
            torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=0, atol=room)
    return program.model


def kinds(model: ir.Model, least: int) -> list[str]:
    """Types of the initializers that have so many elements, or more."""
    return sorted(v.dtype.name for v in model.graph.initializers.values() if v.const_value.size >= least)


def batches(dtype: torch.dtype = torch.float32, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(b, *(shape or (64,)), generator=generator).to(dtype) for b in (3, 7)]


SCHEMES = [
    (bits, group, mapping)
    for bits in ("int2", "int3", "int4", "int5", "int8")
    for group in (32, None)
    for mapping in ("SYMMETRIC", "ASYMMETRIC")
]


def test_torchao_weight_only(tmp_path: Path) -> None:
    """Every scheme, a layer each: exporting them one by one would take minutes."""
    torch.manual_seed(0)
    layers = []
    for bits, group, mapping in SCHEMES:
        granularity = torchao.PerAxis(0) if group is None else torchao.PerGroup(group)
        layer = nn.Sequential(nn.Linear(64, 64, bias=group is None), nn.Tanh())
        layers.append(quantised(layer, getattr(torch, bits), granularity, mapping))
    written = exported(nn.Sequential(*layers).eval(), batches(), tmp_path / "m.onnx")
    nodes = [n for n in written.graph if n.op_type == "DequantizeLinear"]
    for (bits, group, mapping), node in zip(SCHEMES, nodes, strict=True):
        narrow = bits in ("int2", "int3", "int4")
        x, scale, *zero = node.inputs
        assert x.dtype.name == ("INT4" if narrow else "INT8")
        assert x.const_value.nbytes == 64 * 64 // (2 if narrow else 1)
        assert list(scale.shape) == [64, 64 // (group or 64)]
        assert len(zero) == (mapping == "ASYMMETRIC") and all(z.dtype is x.dtype for z in zero)
    assert not [v for v in written.graph.initializers.values() if v.const_value.nbytes > 64 * 64]


@pytest.mark.parametrize(("bits", "kind"), [("uint2", "UINT4"), ("uint4", "UINT4"), ("uint6", "UINT8")])
def test_torchao_shards(tmp_path: Path, bits: str, kind: str) -> None:
    """Six bits are kept as four and two, and written into zeros in place, a piece at a time."""
    if not hasattr(torchao, "UIntXWeightOnlyConfig"):
        pytest.skip("torchao has them no more")
    model = mlp()
    torchao.quantize_(model, torchao.UIntXWeightOnlyConfig(getattr(torch, bits), group_size=32))
    written = exported(model, batches(), tmp_path / "m.onnx")
    assert kinds(written, 64 * 128) == [kind, kind]


def test_size_of_the_file(tmp_path: Path) -> None:
    """Half a byte for each of a million integers, a float32 scale for every 32, and the graph."""
    model = quantised(nn.Sequential(nn.Linear(1024, 1024, bias=False)).eval(), torch.int4, torchao.PerGroup(32))
    exported(model, batches(torch.float32, 1024), tmp_path / "m.onnx")
    size = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert size < 1024 * 1024 // 2 + 1024 * 32 * 4 + 8000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    model = quantised(mlp(dtype, bias=True), torch.int4, torchao.PerGroup(32), "ASYMMETRIC")
    if dtype == torch.float16:
        written = exported(model, batches(dtype), tmp_path / "m.onnx")
    else:  # ONNX Runtime's CPU provider has nothing of it
        written = fxfuse.onnx.export(model, (batches(dtype)[0],)).model
    assert kinds(written, 64 * 128) == ["INT4", "INT4"]
    scales = [n.inputs[1].dtype.name for n in written.graph if n.op_type == "DequantizeLinear"]
    assert scales == [str(dtype).removeprefix("torch.").upper()] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scales_after_the_product(tmp_path: Path, dtype: torch.dtype) -> None:
    """torchao's int8 weights are multiplied as they are, and the product is scaled."""
    model = mlp(dtype, bias=True)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    written = exported(model, batches(dtype), tmp_path / "m.onnx")
    assert kinds(written, 64 * 128) == ["INT8", "INT8"]
    nodes = [n for n in written.graph if n.op_type == "DequantizeLinear"]
    assert [n.inputs[1].const_value.size for n in nodes] == [128, 64]
    assert [n.op_type for n in written.graph].count("Mul") == 1  # of SiLU


class Tied(nn.Module):
    """An embedding, and a last layer of the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        self.head = nn.Linear(64, 100, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_embeddings(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    model = quantised(Tied().eval(), torch.int4, torchao.PerGroup(32))
    if tied:
        model.head.weight = model.embedding.weight
    inputs = [torch.randint(0, 100, (b, 5)) for b in (2, 3)]
    written = exported(model, inputs, tmp_path / "m.onnx")
    assert kinds(written, 6400) == ["INT4"] * (1 if tied else 2)


def test_a_module_that_is_used_twice(tmp_path: Path) -> None:
    layer = nn.Linear(64, 64, bias=False)
    model = quantised(nn.Sequential(layer, nn.SiLU(), layer).eval(), torch.int4, torchao.PerGroup(32))
    written = exported(model, batches(), tmp_path / "m.onnx")
    assert kinds(written, 64 * 64) == ["INT4"]
    assert [n.op_type for n in written.graph].count("DequantizeLinear") == 1


class EveryWay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList(Written(how) for how, *_ in WAYS.values())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(way(x) for way in self.ways)


def test_written_out(tmp_path: Path) -> None:
    written = exported(EveryWay().eval(), batches(), tmp_path / "m.onnx")
    assert kinds(written, 48 * 64) == ["INT4"] * len(WAYS)


def test_values_decide_how_many_bits(tmp_path: Path) -> None:
    """One zero point that does not fit in four bits keeps the integers in eight."""
    model = Written(WAYS["groups"][0])
    model.z[5, 2] = 9
    written = exported(model.eval(), batches(), tmp_path / "m.onnx")
    assert kinds(written, 48 * 64) == ["INT8"]


def test_through_the_plugin(tmp_path: Path) -> None:
    model = quantised(mlp(), torch.int4, torchao.PerGroup(32))
    with fxfuse.onnx.enabled():
        program = torch.onnx.export(
            model, (batches()[0],), dynamo=True, opset_version=24, dynamic_shapes=({0: Dim.AUTO},), verbose=False
        )
    assert program is not None
    assert kinds(program.model, 64 * 128) == ["INT4", "INT4"]
    assert fxfuse.report(program).counts == {"DequantizeLinear": 2}


def test_after_decompositions(tmp_path: Path) -> None:
    """What torchao's operator is made of is the same weight."""
    model = quantised(mlp(), torch.int4, torchao.PerGroup(32), "ASYMMETRIC")
    program = torch.export.export(model, (batches()[0],)).run_decompositions()
    assert fxfuse.report(fxfuse.fuse(program, frozen=True)).counts == {"DequantizeLinear": 2}


def test_unfused_again() -> None:
    model = quantised(mlp(), torch.int4, torchao.PerGroup(32))
    x = batches()[0]
    fused = fxfuse.fuse(torch.export.export(model, (x,)))
    plain = fxfuse.unfuse(fused)
    assert not any("fxfuse" in str(n.target) for n in plain.graph.nodes)
    torch.testing.assert_close(plain.module()(x), model(x))
