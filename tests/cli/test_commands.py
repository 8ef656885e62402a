"""The command line, run in this process: what it writes, prints and returns."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.cli import commands, main
from fxfuse.fusion import fuse_with
from fxfuse.options import Options
from fxfuse.parity import onnxruntime_outputs

LLAMA = {
    "vocab_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "max_seq_len": 32,
    "intermediate_dim": 48,
}
COUNTS = {"RMSNormalization": 5, "RotaryEmbedding": 4, "Attention": 2}


def settings(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in ("--set", f"{name}={value!r}")]


def operators(path: Path) -> dict[str, int]:
    nodes = [node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node]
    return {name: nodes.count(name) for name in COUNTS}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved program of one norm, with a dynamic batch."""
    path = tmp_path_factory.mktemp("saved") / "norm.pt2"
    module = nn.Sequential(nn.RMSNorm(8, eps=1e-5), nn.Linear(8, 4)).eval()
    dynamic = torch.export.Dim.DYNAMIC
    torch.export.save(torch.export.export(module, (torch.randn(2, 3, 8),), dynamic_shapes=({0: dynamic},)), path)
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_component_builder(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "tiny"
    code = main(["export", "torchtune:llama3_2", *settings(LLAMA), "--dtype", dtype, "--out", str(out)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert sorted(p.name for p in out.iterdir()) == ["model.onnx", "model.onnx.data", "report.json"]
    assert [p.name for p in out.parent.iterdir()] == ["tiny"]
    assert operators(out / "model.onnx") == COUNTS
    record = json.loads((out / "report.json").read_text())
    assert record["counts"] == COUNTS
    backends = {check["backend"].split(" ")[0] for check in record["parity"]}
    assert backends == {"PyTorch,", "ONNX"} and all(check["result"]["passed"] for check in record["parity"])
    assert {check["sizes"] for check in record["parity"]} == {"2×16", "1×16", "3×19"}
    assert set(record["seconds"]) >= {"load", "capture", "fuse", "translate", "write", "onnxruntime"}
    assert record["bytes"]["model.onnx.data"] == (out / "model.onnx.data").stat().st_size
    for word in ("RMSNormalization", "Attention", "Against eager", "Where the time went", "weights are random"):
        assert word in printed.out
    assert "translate" in printed.err, "progress goes to stderr"
    (tokens,) = onnx.load(str(out / "model.onnx"), load_external_data=False).graph.input
    assert [dim.dim_param for dim in tokens.type.tensor_type.shape.dim] == ["batch", "sequence"]


def test_the_same_weights_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert (
            main(["export", "torchtune:llama3_2", *settings(LLAMA), "--no-parity", "--out", str(tmp_path / name)]) == 0
        )
    one, two = ((tmp_path / name / "model.onnx.data").read_bytes() for name in ("one", "two"))
    assert one == two
    assert json.loads((tmp_path / "one" / "report.json").read_text())["parity"] == []


def test_a_saved_program(saved: Path, tmp_path: Path) -> None:
    assert main(["export", str(saved), "--out", str(tmp_path / "o"), "--report", str(tmp_path / "r.json")]) == 0
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["counts"] == {"RMSNormalization": 1}
    x = torch.randn(5, 3, 8)
    eager = torch.export.load(saved).module()(x)
    (output,) = onnxruntime_outputs(tmp_path / "o" / "model.onnx", [x])
    torch.testing.assert_close(output, eager)


FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.out = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, 3)
    def forward(self, x, bias=None):
        x = self.norm(x)
        return self.out(x if bias is None else x + bias)

def build(width=8):
    x = torch.randn(2, 4, width)
    return Net(width).eval(), (x,), {"bias": torch.randn(width)}, {"x": {0: "rows"}, "bias": {}}

def bare():
    return Net(8).eval(), (torch.randn(2, 4, 8),)

def training():
    return Net(8), (torch.randn(2, 4, 8),)

def number():
    return Net(8).eval(), (3,)

def broken():
    raise KeyError("no such config")

def module():
    return Net(8)

constant = 3

class Squared(nn.Module):
    def forward(self, q, k, v):
        from torch.nn.attention.flex_attention import flex_attention

        def squared(s, b, h, i, j):
            return torch.where(i - j <= 3, s * s, -torch.inf)

        def near(s, b, h, i, j):
            return torch.where(i - j <= 3, s, -torch.inf)

        return flex_attention(flex_attention(q, k, v, score_mod=squared), k, v, score_mod=near)

def flex(dtype="float32"):
    free = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    qkv = tuple(torch.randn(2, 2, 9, 8, dtype=getattr(torch, dtype)) for _ in range(3))
    return Squared().eval(), qkv, None, (free,) * 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package importable from the current folder only."""
    package = tmp_path / "cwd" / f"pkg_{os.getpid()}_{abs(hash(str(tmp_path)))}"
    package.mkdir(parents=True)
    (package / "models.py").write_text(FACTORY)
    monkeypatch.chdir(package.parent)
    monkeypatch.setattr("sys.path", [path for path in __import__("sys").path if path])
    return f"{package.name}.models"


@pytest.mark.parametrize(("name", "dtype"), [("build", "float16"), ("bare", "float32")])
def test_a_factory(factories: str, name: str, dtype: str, tmp_path: Path) -> None:
    arguments = ["export", f"{factories}:{name}", "--dtype", dtype, "--out", str(tmp_path / "o")]
    assert main([*arguments, *(settings({"width": 16}) if name == "build" else [])]) == 0
    record = json.loads((tmp_path / "o" / "report.json").read_text())
    assert record["counts"] == {"RMSNormalization": 1}
    assert all(check["result"]["dtype"] == dtype for check in record["parity"])
    assert len({check["sizes"] for check in record["parity"]}) == (3 if name == "build" else 1)


def test_flex_attention_as_it_is_asked_for(factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FlexAttention is compared as its function body, windows as attributes: ONNX Runtime has no kernel of either."""
    asked = ["--flex-attention", "preview", "--opset", "25", "--windows", "attributes"]
    assert main(["export", f"{factories}:flex", *asked, "--out", str(tmp_path / "o")]) == 0
    written = sorted(path.name for path in (tmp_path / "o").iterdir())
    assert written == ["model.onnx", "model.onnx.data", "report.json"]
    nodes = {node.op_type: node for node in onnx.load(str(tmp_path / "o" / "model.onnx")).graph.node}
    assert set(nodes) == {"FlexAttention", "Attention"}
    assert {a.name: a.i for a in nodes["Attention"].attribute}["left_window_size"] == 3
    record = json.loads((tmp_path / "o" / "report.json").read_text())
    assert record["counts"] == {"FlexAttention": 1, "Attention": 1}
    backends = {check["backend"] for check in record["parity"]}
    assert backends == {"PyTorch, fused", "ONNX Runtime (FlexAttention inlined)"}
    assert all(check["result"]["passed"] for check in record["parity"])


def test_inspect_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "torchtune:llama3_2", *settings(LLAMA), "--opset", "23"]) == 0
    printed = capsys.readouterr().out
    assert "opset 23" in printed and "RotaryEmbedding" in printed and "peak memory" in printed
    assert list(tmp_path.iterdir()) == []


def test_patterns_lists_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["patterns"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("rms_norm", "rotary_embedding", "attention", "RMSNormalization"))


def wrong_fuse(program: torch.export.ExportedProgram, options: Options) -> torch.export.ExportedProgram:
    """A fusion with a defect: every norm has the wrong epsilon."""
    fused = fuse_with(program, options)
    for node in fused.graph.nodes:
        if "rms_norm" in str(node.target):
            node.kwargs = {**node.kwargs, "epsilon": 0.5}
    fused.graph_module.recompile()
    return fused


@pytest.mark.parametrize("stale", [False, True], ids=["new folder", "older model there"])
def test_no_parity_leaves_no_model(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stale: bool
) -> None:
    out = tmp_path / "o"
    if stale:
        assert main(["export", str(saved), "--out", str(out)]) == 0
        (out / "README").write_text("mine")
    monkeypatch.setattr(commands, "fuse_with", wrong_fuse)
    report = tmp_path / "r.json"
    assert main(["export", str(saved), "--out", str(out), "--report", str(report)]) == 3
    error = capsys.readouterr().err
    assert "does not compute what the original does" in error and "export shape" in error and "Traceback" not in error
    assert [p.name for p in out.rglob("*")] == (["README"] if stale else [])
    assert {p.name for p in tmp_path.iterdir()} <= {"o", "r.json"}
    assert not all(check["result"]["passed"] for check in json.loads(report.read_text())["parity"])


def test_an_older_model_is_replaced_and_other_files_are_kept(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model.onnx").write_text("old")
    assert main(["export", str(saved), "--out", str(tmp_path)]) == 0
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    assert (tmp_path / "notes.txt").read_text() == "mine"


BAD: dict[str, tuple[list[str], list[str]]] = {
    "unknown builder": (["torchtune:llama3_2_1"], ["no builder", "llama3_2_1", "llama3_2_1b"]),
    "unknown family": (["torchtune:qwen2.llama2"], ["no builder", "qwen2.llama2"]),
    "unknown option": (
        ["torchtune:llama3_2_1b", "--set", "tie_embeddings=True"],
        ["tie_embeddings", "tie_word_embeddings"],
    ),
    "missing options": (["torchtune:llama3_2"], ["llama3_2 needs", "vocab_size", "--set num_layers"]),
    "refused options": (
        ["torchtune:llama3_2", *settings({**LLAMA, "num_kv_heads": 3})],
        ["refuses", "num_kv_heads", "torchtune:llama3_2"],
    ),
    "not NAME=VALUE": (["torchtune:llama3_2", "--set", "layers"], ["NAME=VALUE", "layers"]),
    "not a literal": (["torchtune:llama3_2", "--set", "vocab_size=many"], ["'many'", "vocab_size", "literal"]),
    "dtype": (["torchtune:llama3_2_1b", "--dtype", "float8"], ["float8", "float16"]),
    "opset 22": (["torchtune:llama3_2_1b", "--opset", "22"], ["22", "23", "25"]),
    "opset 26": (["torchtune:llama3_2_1b", "--opset", "26"], ["26", "23", "25"]),
    "too long": (["torchtune:llama3_2", *settings(LLAMA), "--seq", "33"], ["32 tokens", "--seq 33"]),
    "batch of one": (["torchtune:llama3_2", *settings(LLAMA), "--batch", "1"], ["at least 2", "--batch 1"]),
    "windows at 24": (["torchtune:llama3_2_1b", "--windows", "attributes"], ["windows", "opset 25"]),
    "no such file": (["missing.pt2"], ["no such file", "missing.pt2"]),
    "no such source": (["llama"], ["no such source", "llama", "torchtune:"]),
    "no such module": (["no_such_pkg.models:build"], ["cannot be imported", "no_such_pkg"]),
    "no such checkpoint": (
        ["torchtune:llama3_2", *settings(LLAMA), "--checkpoint", "nowhere"],
        ["no such checkpoint", "nowhere"],
    ),
    "batch of a factory": (["json:loads", "--batch", "4"], ["--batch", "torchtune"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, words = BAD[case]
    assert main(["export", *arguments, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for word in words:
        assert word in error
    assert list(tmp_path.iterdir()) == []
    assert main(["inspect", *arguments]) == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("number", ["could not capture", "TypeError"]),
        ("broken", ["KeyError", "no such config", "models.py"]),
        ("module", ["returned Net", "(model, args"]),
        ("constant", ["not a function"]),
        ("absent", ["cannot be imported", "absent"]),
    ],
)
def test_bad_factories(factories: str, name: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{factories}:{name}"]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x05\x06" + bytes(18)], ids=["empty", "text", "empty zip"])
def test_a_pt2_that_is_none(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.pt2"
    path.write_bytes(content)
    assert main(["inspect", str(path)]) == 2
    error = capsys.readouterr().err
    assert "not a program saved with torch.export.save" in error and "bad.pt2" in error


def test_a_program_that_is_fused_already(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fused.pt2"
    torch.export.save(fxfuse.fuse(torch.export.load(saved)), path)
    assert main(["export", str(path), "--out", str(tmp_path / "o")]) == 2
    assert "fxfuse" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_options_that_a_saved_program_has_no_use_for(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--dtype", "float16"], ["--set", "a=1"], ["--checkpoint", "x"], ["--seq", "4"]):
        assert main(["inspect", str(saved), *option]) == 2
        assert option[0] in capsys.readouterr().err


@pytest.mark.parametrize("where", ["file", "file/under"])
def test_an_output_folder_that_cannot_be(
    where: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(["export", str(saved), "--out", str(tmp_path / where)]) == 2
    error = capsys.readouterr().err
    assert "output folder" in error and "file" in error
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    (tmp_path / "d.json").mkdir()
    assert main(["inspect", str(saved), "--report", str(tmp_path / "d.json")]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main(["inspect", str(saved), "--report", str(tmp_path / "r.txt")]) == 2
    assert ".html or as .json" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.json", "file"]


def test_wrong_usage_exits_with_two() -> None:
    for arguments in ([], ["export"], ["export", "torchtune:llama3_2_1b"], ["nonsense"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
