"""The benchmark's own machinery, with tiny shapes on the CPU and a clock that does not measure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.kernels import problems
from tests.benchmarks.kernels.__main__ import arguments, line, record_of
from tests.benchmarks.kernels.measure import copy_bandwidth, measure
from tests.benchmarks.kernels.picture import draw
from tests.benchmarks.kernels.problems import PROBLEMS, Problem

CPU = torch.device("cpu")


def once(run: Any) -> float:
    run()
    return 0.5


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(problems.TOKENS, "some", (3,))
    monkeypatch.setitem(problems.HIDDEN, "some", (64,))
    monkeypatch.setitem(problems.LENGTHS, "some", (16,))
    # Compiling takes a minute; what it would compile runs all the same.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.usefixtures("tiny")
def test_every_problem_runs_and_agrees(tmp_path: Path) -> None:
    record = record_of(arguments(["--sizes", "some"]), CPU, once, [1 << 12, 1 << 16])
    assert {row["op"].split(",")[0] for row in record["rows"]} == set(PROBLEMS)
    for row in record["rows"]:
        assert {"fxfuse", "composite"} <= set(row["ms"]), row["missing"]
        # What there is only on a GPU, or perhaps not at all, says so.
        assert set(row["missing"]) <= {"Liger", "SDPA flash", "SDPA efficient", "SDPA cuDNN"}, row["missing"]
        assert row["times as long as fxfuse"]["fxfuse"] == 1.0
    norm = next(row for row in record["rows"] if row["op"] == "rms_norm")
    assert norm["bytes"] == 2 * (3 * 64 * 2) + 64 * 2 and norm["GB/s"]["fxfuse"] == norm["bytes"] / 0.5e6
    draw(record, tmp_path / "bandwidth.png")
    assert (tmp_path / "bandwidth.png").stat().st_size > 1000


def test_a_wrong_answer_is_not_timed() -> None:
    runs = {"composite": lambda: torch.ones(3), "fxfuse": lambda: torch.ones(3), "fast": lambda: torch.zeros(3)}
    runs["absent"] = lambda: __import__("no_such_package")
    (row,) = measure([Problem("norm", {"tokens": 3}, torch.float32, runs, 24)], once, copy_bandwidth(CPU, once, [16]))
    assert set(row["ms"]) == {"composite", "fxfuse"}
    assert "differs from the composite by 1" in row["missing"]["fast"]
    assert "ModuleNotFoundError" in row["missing"]["absent"] and "absent: Module" in line(row)
    assert row["of copy bandwidth"] == 24 / 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.kernels", "--out", str(tmp_path / "x.json")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent, check=False)
    assert ran.returncode == 2 and "there is no GPU" in ran.stderr and "Traceback" not in ran.stderr
    assert not (tmp_path / "x.json").exists()
