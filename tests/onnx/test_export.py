"""`fxfuse.onnx.export`: what it takes, what it returns, what it writes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from torchtune.models.llama3_2 import llama3_2

import fxfuse
import fxfuse.onnx
from fxfuse.errors import FxfuseError
from fxfuse.onnx.capturing.asked import as_auto
from fxfuse.parity import compare, onnxruntime_outputs, wide_outputs
from fxfuse.patterns.rms_norm import PATTERN as RMS_NORM


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    return llama3_2(
        vocab_size=64, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=64, intermediate_dim=48
    ).eval()


TOKENS = torch.arange(10).reshape(2, 5)
SHAPES = {"tokens": {0: "batch", 1: "sequence"}}


class Scale(nn.Module):
    def forward(self, x: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
        return x * factor


class Flags(nn.Module):
    """An input that is a flag, and one that may be None."""

    def forward(self, x: torch.Tensor, double: bool = False, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = x * 2 if double else x
        return y if bias is None else y + bias


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama()


@pytest.fixture(scope="module")
def exported(model: nn.Module) -> torch.onnx.ONNXProgram:
    return fxfuse.onnx.export(model, (TOKENS,), dynamic_shapes=SHAPES)


def test_fused_operators_are_standard_nodes(exported: torch.onnx.ONNXProgram) -> None:
    counts = Counter(node.op_type for node in exported.model.graph)
    assert {name: counts[name] for name in ("RMSNormalization", "RotaryEmbedding", "Attention")} == {
        "RMSNormalization": 5,
        "RotaryEmbedding": 4,
        "Attention": 2,
    }
    assert {node.domain for node in exported.model.graph} == {""}
    assert exported.model.opset_imports[""] == 24
    assert not exported.model.functions


def test_the_report_comes_with_the_program(exported: torch.onnx.ONNXProgram) -> None:
    assert fxfuse.report(exported).counts == {"RMSNormalization": 5, "RotaryEmbedding": 4, "Attention": 2}


def test_strings_name_the_dimensions(exported: torch.onnx.ONNXProgram) -> None:
    (tokens,) = exported.model.graph.inputs
    assert tokens.name == "tokens" and tokens.shape is not None
    assert [str(dim.value) for dim in tokens.shape] == ["batch", "sequence"]  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [(2, 5), (1, 5), (3, 9)], ids=str)
def test_computes_what_the_model_does(
    model: nn.Module, exported: torch.onnx.ONNXProgram, shape: tuple[int, int]
) -> None:
    tokens = torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(3))
    program = torch.export.export(model, (TOKENS,), dynamic_shapes=as_auto(SHAPES))
    with torch.no_grad():
        eager = model(tokens)
    result = compare([eager], onnxruntime_outputs(exported, [tokens]), wide_outputs(program, (tokens,)))
    assert result.passed, result


def test_a_program_gives_the_same_graph_as_its_module(model: nn.Module, exported: torch.onnx.ONNXProgram) -> None:
    auto = torch.export.Dim.AUTO
    program = torch.export.export(model, (TOKENS,), dynamic_shapes={"tokens": {0: auto, 1: auto}})
    again = fxfuse.onnx.export(program, input_names=["ids"], output_names=["logits"])
    assert [node.op_type for node in again.model.graph] == [node.op_type for node in exported.model.graph]
    assert [value.name for value in (*again.model.graph.inputs, *again.model.graph.outputs)] == ["ids", "logits"]


@pytest.mark.parametrize("opset", [23, 24, 25, None])
def test_opsets(model: nn.Module, opset: int | None) -> None:
    exported = fxfuse.onnx.export(model, (TOKENS,), opset_version=opset)
    assert exported.model.opset_imports[""] == (opset or 24)
    assert fxfuse.report(exported).counts == {"RMSNormalization": 5, "RotaryEmbedding": 4, "Attention": 2}


@pytest.mark.parametrize("external", [True, False])
def test_files(model: nn.Module, tmp_path: Path, external: bool) -> None:
    path = tmp_path / "new" / "tiny.onnx"
    fxfuse.onnx.export(model, (TOKENS,), path, dynamic_shapes=SHAPES, external_data=external)
    assert {p.name for p in path.parent.iterdir()} == ({"tiny.onnx", "tiny.onnx.data"} if external else {"tiny.onnx"})
    onnx.checker.check_model(str(path), full_check=True)
    with torch.no_grad():
        assert compare([model(TOKENS)], onnxruntime_outputs(path, [TOKENS])).passed


def test_flags_and_none_are_part_of_the_call() -> None:
    x = torch.ones(2, 3)
    exported = fxfuse.onnx.export(Flags().eval(), (x,), kwargs={"double": True, "bias": None})
    (output,) = onnxruntime_outputs(exported, [x])
    assert torch.equal(output, x * 2)


def test_options_of_torch_onnx_export_pass_through(model: nn.Module) -> None:
    plain = fxfuse.onnx.export(model, (TOKENS,), optimize=False, verbose=False, verify=False)
    optimised = fxfuse.onnx.export(model, (TOKENS,))
    assert len(list(plain.model.graph)) > len(list(optimised.model.graph))


def test_nothing_of_the_callers_changes(model: nn.Module) -> None:
    weights = {
        name: (tensor, tensor._version, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()
    }
    program = torch.export.export(model, (TOKENS,))
    before = str(program.graph)
    random = torch.random.get_rng_state()
    fxfuse.onnx.export(program)
    fxfuse.onnx.export(model, (TOKENS,))
    assert str(program.graph) == before
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not any(module.training for module in model.modules())
    for name, tensor in model.state_dict(keep_vars=True).items():
        old, version, value = weights[name]
        assert tensor is old or tensor.data_ptr() == old.data_ptr()
        assert tensor._version == version and torch.equal(tensor, value) and tensor.requires_grad == old.requires_grad


X = torch.ones(2, 3)
BAD_INPUT = {
    "not a model": (lambda: fxfuse.onnx.export("model.pt2"), ["torch.nn.Module", "got str", "where: model"]),
    "not a program": (lambda: fxfuse.fuse(Scale()), ["Scale"]),
    "opset 22": (lambda: fxfuse.onnx.export(Scale().eval(), (X,), opset_version=22), ["23", "25", "22"]),
    "opset 26": (lambda: fxfuse.onnx.export(Scale().eval(), (X,), opset_version=26), ["23", "25", "26"]),
    "opset text": (lambda: fxfuse.onnx.export(Scale().eval(), (X,), opset_version="24"), ["'24'", "opset_version"]),
    "numpy": (lambda: fxfuse.onnx.export(Scale().eval(), (X.numpy(),)), ["numpy.ndarray", "args[0]", "as_tensor"]),
    "a type": (lambda: fxfuse.onnx.export(Scale().eval(), kwargs={"x": torch.int8}), ["torch.dtype", "kwargs['x']"]),
    "not a tuple": (lambda: fxfuse.onnx.export(Scale().eval(), 3), ["args", "int"]),
    "complex": (lambda: fxfuse.onnx.export(Scale().eval(), (X + 1j,)), ["complex64", "args[0]", "view_as_real"]),
    "complex program": (
        lambda: fxfuse.onnx.export(torch.export.export(Scale().eval(), (X + 1j,))),
        ["complex64", "'x'"],
    ),
    "training": (
        lambda: fxfuse.onnx.export(nn.Sequential(nn.Dropout()), (X,)),
        ["training mode", "dropout.py", "Sequential", ".eval()"],
    ),
    "wrong arguments": (lambda: fxfuse.onnx.export(Scale().eval(), (X, X, X)), ["could not capture", "Scale"]),
    "a stream": (
        lambda: fxfuse.onnx.export(Scale().eval(), (X,), __import__("io").BytesIO()),
        ["path", "where: f"],
    ),
    "torchscript": (lambda: fxfuse.onnx.export(Scale().eval(), (X,), dynamo=False), ["dynamo"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(case: str) -> None:
    call, words = BAD_INPUT[case]
    with pytest.raises(FxfuseError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_one_submodule_in_training_mode_is_named() -> None:
    module = nn.Sequential(Scale(), nn.Dropout()).eval()
    module[1].train()
    with pytest.raises(FxfuseError, match=r"(?s)training mode.*Sequential: 1"):
        fxfuse.onnx.export(module, (X,))


def test_a_fused_program_is_written_as_it_is(model: nn.Module, tmp_path: Path) -> None:
    fused = fxfuse.fuse(torch.export.export(model, (TOKENS,)), patterns=[RMS_NORM])
    exported = fxfuse.onnx.export(fused)
    assert fxfuse.report(exported).counts == {"RMSNormalization": 5}
    assert Counter(node.op_type for node in exported.model.graph)["RMSNormalization"] == 5
    torch.export.save(fused, tmp_path / "fused.pt2")
    loaded = fxfuse.onnx.export(torch.export.load(tmp_path / "fused.pt2"))
    assert [n.op_type for n in loaded.model.graph] == [n.op_type for n in exported.model.graph]
    with pytest.raises(FxfuseError, match="no fusion report"):  # it stayed in the process that fused
        fxfuse.report(loaded)


def test_an_unwritable_file_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(FxfuseError, match=r"(?s)cannot be written.*file"):
        fxfuse.onnx.export(Scale().eval(), (X,), tmp_path / "file" / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    fxfuse.onnx.export(Scale().eval(), (X,), path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(self: object, destination: Path, **_: object) -> None:
        Path(destination).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", full)
    with pytest.raises(FxfuseError, match="No space left"):
        fxfuse.onnx.export(Scale().eval(), (X,), path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
