"""The kernels compile for GPUs, and torch.compile sees their launches: told by Triton's compiler, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton compiles the kernels")

ROOT = Path(__file__).parent.parent.parent
SHARED = 99 << 10
"""Bytes of shared memory that a program can have on every GPU since Ampere."""


@cache
def ran(*arguments: str) -> Any:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.without_gpu", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(capability: str, dtype: str, sizes: str) -> None:
    compiled = ran("compile", capability, dtype, sizes)
    kernels = {record["kernel"] for record in compiled}
    assert len(kernels) == 7, kernels
    for record in compiled:
        assert record["cubin"] > 0, record
        assert record["shared"] <= SHARED, record
        if dtype != "float64":
            assert record["vector loads"] > 0, record
        # Products of float32 are exact, and float64 has tensor cores up to Hopper only.
        if record["case"].startswith("heads of") and dtype.endswith("16"):
            assert record["tensor cores"] > 0, record


def test_for_hopper() -> None:
    check("90", "bfloat16", "one")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("capability", ["80", "89", "90", "100"])
def test_for_others(capability: str, dtype: str) -> None:
    check(capability, dtype, "all")


@pytest.mark.slow
@pytest.mark.parametrize("op", ["rms_norm", "rotary_embedding", "tensor_scatter", "attention"])
def test_for_calls_of_the_matrix(op: str) -> None:
    compiled = ran("matrix", op)
    assert len(compiled) >= 30 and all(record["shared"] <= SHARED for record in compiled)


def test_torch_compile_sees_the_launches() -> None:
    calls = ran("trace")["compile"]
    assert not [call for call in calls if "fxfuse" in call]
    # One for each of the first six calls, three for attention's backward.
    assert calls.count("triton_kernel_wrapper_functional") == 9


def test_an_exported_program_keeps_the_operators() -> None:
    calls = [call.removeprefix("fxfuse.") for call in ran("trace")["export"] if "fxfuse" in call]
    assert sorted(calls) == [
        "attention.default",
        "attention_backward.default",
        "rms_norm.default",
        "rms_norm_backward.default",
        "rotary_embedding.default",
        "rotary_embedding_backward.default",
        "tensor_scatter.default",
    ]
    assert not [call for call in ran("trace")["export"] if "triton" in call]
