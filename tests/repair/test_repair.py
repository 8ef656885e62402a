"""Real files, mended: they run at any batch and compute what the PyTorch model does."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from onnxscript.rewriter import RewriteRuleClassBase

from fxfuse.cli import main
from fxfuse.errors import FxfuseError, ParityError
from fxfuse.parity import OnnxRuntime, compare
from fxfuse.repair import file as story
from fxfuse.repair import repair
from tests.repair.conftest import VOCABULARY, Exported, export, torchtune_llama

SIZES = [(1, 7), (2, 5), (3, 12)]


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node)


def content(path: Path) -> tuple[Any, ...]:
    """All that a file means: its graph, opsets and weights, wherever they lie."""
    model = onnx.load(str(path))
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    del model.graph.initializer[:]
    return model, {n: (w.dtype, w.shape, w.tobytes()) for n, w in weights.items()}


def check_against_eager(model: torch.nn.Module, path: Path) -> None:
    session = OnnxRuntime(path)
    for size in SIZES:
        tokens = torch.randint(0, VOCABULARY, size)
        with torch.no_grad():
            eager = model(tokens)
        result = compare([eager], session(tokens), dtype=next(model.parameters()).dtype)
        assert result.passed, f"{size}: {result.reason}"


def test_rope_of_batch_one(rotary: Exported, tmp_path: Path) -> None:
    with pytest.raises(FxfuseError, match="RotaryEmbedding"):
        OnnxRuntime(rotary.path, quiet=True)(torch.zeros(2, 5, dtype=torch.int64))
    done = repair(rotary.path, tmp_path / "fixed.onnx")
    assert {what.split(":")[0]: count for what, count in done.changes.items()} == {"RotaryEmbedding": 4, "Attention": 2}
    assert [run.batch for run in done.runs] == [1, 2] and all(run.result and run.result.passed for run in done.runs)
    assert "row by row" in done.runs[1].against
    check_against_eager(rotary.model, tmp_path / "fixed.onnx")


def test_what_all_layers_share_is_computed_once(rotary: Exported, tmp_path: Path) -> None:
    repair(rotary.path, tmp_path / "fixed.onnx")
    before, after = operators(rotary.path), operators(tmp_path / "fixed.onnx")
    assert (before["Cos"], before["Sin"]) == (4, 4) and (after["Cos"], after["Sin"]) == (1, 1)
    assert before["Expand"] - 4 + 2 == after["Expand"], "four repeats less, cos and sin expanded"
    assert sum(after.values()) < sum(before.values())


def test_mixed_types(mixed: Exported, tmp_path: Path) -> None:
    with pytest.raises(FxfuseError, match="does not load"):
        OnnxRuntime(mixed.path, quiet=True)
    done = repair(mixed.path, tmp_path / "fixed.onnx")
    assert {what.split(":")[0]: count for what, count in done.changes.items()} == {
        "RMSNormalization": 5,
        "Attention": 2,
    }
    assert all("does not load, in float32" in run.against and run.result for run in done.runs)
    check_against_eager(mixed.model, tmp_path / "fixed.onnx")


@pytest.mark.parametrize("name", ["rotary", "mixed"])
def test_keys_and_values_are_not_repeated(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    repair(request.getfixturevalue(name).path, tmp_path / "fixed.onnx")
    nodes = [node for node in ir.load(tmp_path / "fixed.onnx").graph if node.op_type == "Attention"]
    for node in nodes:
        q, k, v = node.inputs[:3]
        assert [x.shape[1] for x in (q, k, v) if x is not None and x.shape is not None] == [4, 2, 2]
    assert len(nodes) == 2


def test_a_healthy_file_is_left_as_it_is(healthy: Exported, tmp_path: Path) -> None:
    done = repair(healthy.path, tmp_path / "model.onnx")
    assert (done.changes, done.runs) == ({}, [])
    assert content(tmp_path / "model.onnx") == content(healthy.path)


def test_mending_twice_changes_nothing_more(rotary: Exported, tmp_path: Path) -> None:
    repair(rotary.path, tmp_path / "once.onnx")
    assert repair(tmp_path / "once.onnx", tmp_path / "twice.onnx").changes == {}
    assert content(tmp_path / "twice.onnx") == content(tmp_path / "once.onnx")


def test_in_place(rotary: Exported, tmp_path: Path) -> None:
    for file in rotary.path.parent.glob("model.onnx*"):
        shutil.copy(file, tmp_path)
    repair(tmp_path / "model.onnx", tmp_path / "model.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    check_against_eager(rotary.model, tmp_path / "model.onnx")


@pytest.mark.slow
def test_bfloat16(tmp_path: Path) -> None:
    """ONNX Runtime's CPU provider has no kernels for it: both files run in float32."""
    model = export(torchtune_llama(torch.bfloat16), tmp_path / "model.onnx")
    done = repair(model.path, tmp_path / "fixed.onnx")
    assert all("in float32" in run.against and run.result for run in done.runs)


class Wrong(RewriteRuleClassBase):
    """A rule with an error in it."""

    what = "RMSNormalization: no normalisation"

    def pattern(self, op: Any, x: Any, scale: Any) -> Any:
        return op.RMSNormalization(x, scale)

    def rewrite(self, op: Any, x: ir.Value, scale: ir.Value, **_: Any) -> Any:
        return op.Mul(x, scale)


def test_a_wrong_mend_is_not_written(
    healthy: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(story, "rules", lambda: [Wrong])
    with pytest.raises(ParityError, match="does not compute what the original does"):
        repair(healthy.path, tmp_path / "fixed.onnx")
    assert list(tmp_path.iterdir()) == []
    assert main(["repair", str(healthy.path), "--out", str(tmp_path / "fixed.onnx")]) == 3
    assert "does not compute" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_the_command(rotary: Exported, healthy: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["repair", str(rotary.path), "--out", str(tmp_path / "deep" / "fixed.onnx")]) == 0
    said = capsys.readouterr().out
    assert "RotaryEmbedding: cos, sin" in said and "(×4)" in said and "batch 2: at most" in said
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["fixed.onnx", "fixed.onnx.data"]
    assert main(["repair", str(healthy.path), "--out", str(tmp_path / "same.onnx")]) == 0
    assert "Nothing to repair" in capsys.readouterr().out
    assert main(["repair", str(rotary.path), "--out", str(tmp_path / "quick.onnx"), "--no-parity"]) == 0
    assert "batch" not in capsys.readouterr().out.replace("batch of x", "").replace("batch 1 expanded", "")


def test_bad_input(rotary: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.onnx").write_text("this is no model")
    shutil.copy(rotary.path, tmp_path / "lone.onnx")
    old = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> f (float[n] x) => (float[n] y) { y = Abs(x) }'
    )
    onnx.save(old, tmp_path / "old.onnx")
    before = sorted(tmp_path.iterdir())
    for name, word in {
        "absent.onnx": "no such file",
        "text.onnx": "not an ONNX model",
        "lone.onnx": "external data is missing",
        "old.onnx": "opset 18",
    }.items():
        assert main(["repair", str(tmp_path / name), "--out", str(tmp_path / "out.onnx")]) == 2
        assert word in capsys.readouterr().err
    assert main(["repair", str(rotary.path), "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
