"""``fxfuse parity``: what it prints, writes and returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fxfuse.cli import main
from fxfuse.kernels.table import kernels as kernel_table

LLAMA = [
    "torchtune:llama3_2", "--set", "vocab_size=64", "--set", "num_layers=1", "--set", "num_heads=4",
    "--set", "num_kv_heads=2", "--set", "embed_dim=32", "--set", "max_seq_len=32", "--dtype", "float16",
]  # fmt: skip


def test_operators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, picture = tmp_path / "parity.json", tmp_path / "parity.png"
    assert main(["parity", "--op", "tensor_scatter", "--json", str(record), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert f"Triton {'compiled' if torch.cuda.is_available() else 'interpreted'}" in printed
    assert "onnxruntime did not run: ONNX Runtime: it has no bfloat16" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(record.read_text())
    assert (
        found["failed"] == 0 and found["device"].startswith("CPU") and found["versions"]["torch"] == torch.__version__
    )
    ran = [cell for cell in found["cells"] if cell["ulp"] is not None]
    assert {cell["implementation"] for cell in ran} == {"eager", "composite", "triton", "onnxruntime"}
    assert {cell["point"]["dtype"] for cell in ran} == {"float32", "float16", "bfloat16"}


def spoil(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    right = kernel_table()[op]

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return right.function(*args, **kwargs).roll(1, -1)

    monkeypatch.setitem(kernel_table(), op, right._replace(function=wrong))


def test_a_failure_is_exit_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "tensor_scatter")
    record = tmp_path / "parity.json"
    assert main(["parity", "--op", "tensor_scatter", "--json", str(record)]) == 3
    printed = capsys.readouterr()
    assert "failed: tensor_scatter[" in printed.out and ", triton: " in printed.out
    assert "comparisons failed" in printed.err and "Traceback" not in printed.err
    failed = [cell for cell in json.loads(record.read_text())["cells"] if not cell["passed"]]
    assert len(failed) == json.loads(record.read_text())["failed"] > 20
    assert {cell["implementation"] for cell in failed} == {"triton"}


def test_a_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name, kernel in list(kernel_table().items()):

        def counted(*args: Any, name: str = name, kernel: Any = kernel, **kwargs: Any) -> Any:
            ran.append(name)
            return kernel.function(*args, **kwargs)

        monkeypatch.setitem(kernel_table(), name, kernel._replace(function=counted))
    assert main(["parity", *LLAMA]) == 0
    printed = capsys.readouterr().out
    assert "torchtune:llama3_2: largest error" in printed
    assert all(word in printed for word in ("export shape", "batch 1", "other shape", "onnxruntime"))
    # Three shapes of one layer: two norms and the last one, q and k rotated, one attention.
    assert [ran.count(op) for op in ("rms_norm", "rotary_embedding", "attention")] == [9, 6, 3]


def test_a_saved_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "norm.pt2"
    program = torch.export.export(torch.nn.RMSNorm(8, eps=1e-5).eval(), (torch.randn(2, 3, 8),))
    torch.export.save(program, path)
    assert main(["parity", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "float32" in printed and "export shape" in printed and "batch 1" not in printed


def test_a_model_with_a_wrong_kernel(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "attention")
    assert main(["parity", *LLAMA]) == 3
    assert "triton" in capsys.readouterr().err


BAD: dict[str, tuple[list[str], list[str]]] = {
    "operator": (["--op", "conv"], ["'conv'", "rms_norm"]),
    "device": (["--device", "tpu9"], ["no device", "tpu9"]),
    "another kind": (["--device", "meta"], ["not tried on meta"]),
    "option of a model": (["--dtype", "float16"], ["--dtype is for a model"]),
    "setting of a model": (["--set", "a=1"], ["--set is for a model"]),
    "operator of a model": ([*LLAMA, "--op", "rms_norm"], ["not for a model"]),
    "no folder": (["--plot", "nowhere/x.png"], ["no such folder", "nowhere"]),
    "no source": (["llama"], ["no such source"]),
    "opset": (["--opset", "22"], ["22", "23"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, words = BAD[case]
    assert main(["parity", *arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and all(word in error for word in words), error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "--device", "cuda"]) == 2
    assert "there is no GPU here" in capsys.readouterr().err
