"""``fxfuse verify``: what it prints, writes and returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.cli import main
from fxfuse.graph.program import copy_program


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program, its fusion, and the same with another epsilon and with another weight."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    module = nn.Sequential(nn.RMSNorm(8, eps=1e-5), nn.Linear(8, 4)).eval()
    program = torch.export.export(module, (torch.randn(2, 3, 8),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    fused = fxfuse.fuse(program)
    epsilon, weight = copy_program(fused), copy_program(fused)
    for node in epsilon.graph.nodes:
        if "rms_norm" in str(node.target):
            node.kwargs = {**node.kwargs, "epsilon": 0.5}
    double = nn.Parameter(2 * weight.state_dict["0.weight"].detach())
    weight._state_dict = {**weight.state_dict, "0.weight": double}
    for name, one in {"original": program, "fused": fused, "epsilon": epsilon, "weight": weight}.items():
        torch.export.save(one, folder / f"{name}.pt2")
    return folder


def test_a_fused_program_is_proven(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "r.json"
    assert main(["verify", str(files / "original.pt2"), str(files / "fused.pt2"), "--report", str(report)]) == 0
    printed = capsys.readouterr()
    assert "verified: 1 calls are the original's own" in printed.out
    (line,) = [line for line in printed.out.splitlines() if line.startswith("RMSNormalization ×1: ")]
    assert "draws at" in line and "sizes" in line
    assert "verify" in printed.err, "progress goes to stderr"
    record = json.loads(report.read_text())
    assert record["verified"] and record["operators"] == {"RMSNormalization": 1}
    assert record["regions"][0]["evidence"]["draws"] >= 2 and record["regions"][0]["nodes"] == ["rms_norm_1"]
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_program_with_nothing_fused(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = str(files / "original.pt2")
    assert main(["verify", original, original]) == 0
    assert capsys.readouterr().out.splitlines() == ["verified: 2 calls are the original's own"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("epsilon", ["epsilon is 0.5, proven is 1e-05", "node rms_norm_1", "in the original"]),
        ("weight", ["parameter 0.weight", "it is 2.0, in the original 1.0"]),
    ],
)
def test_what_differs_exits_with_three(
    name: str, words: list[str], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "r.json"
    assert main(["verify", str(files / "original.pt2"), str(files / f"{name}.pt2"), "--report", str(report)]) == 3
    printed = capsys.readouterr()
    assert all(word in printed.err for word in words), printed.err
    assert "Traceback" not in printed.err and "verified" not in printed.out
    record = json.loads(report.read_text())
    assert not record["verified"] and record["refused"]["what"]


def test_bad_input_exits_with_two(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original, fused = str(files / "original.pt2"), str(files / "fused.pt2")
    (tmp_path / "text.pt2").write_text("no archive")
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.pt2")
    (tmp_path / "d.json").mkdir()
    cases = [
        ([original, str(tmp_path / "none.pt2")], ["no such file", "none.pt2"]),
        ([str(tmp_path), fused], ["no checkpoint", "config.json"]),
        ([original, str(tmp_path / "text.pt2")], ["not a program saved with torch.export.save", "text.pt2"]),
        ([str(tmp_path / "weights.pt2"), fused], ["not a program saved with torch.export.save", "weights.pt2"]),
        ([fused, original], ["fused already"]),
        ([original, fused, "--report", str(tmp_path / "r.html")], [".json"]),
        ([original, fused, "--report", str(tmp_path / "d.json")], ["is a folder"]),
    ]
    for arguments, words in cases:
        assert main(["verify", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert all(word in error for word in words) and "Traceback" not in error, error
    assert {p.name for p in tmp_path.iterdir()} == {"text.pt2", "weights.pt2", "d.json"}
    with pytest.raises(SystemExit) as caught:
        main(["verify", original])
    assert caught.value.code == 2
