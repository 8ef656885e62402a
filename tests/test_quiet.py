"""What a door prints is what it has to say: torch's and transformers' own chatter is left out, and nothing else."""

from __future__ import annotations

import copy
import logging
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.export._trace
import torch.utils._pytree as pytree

from fxfuse.quiet import quiet, shared_specs

MODELS = """
import torch
from torch import nn

class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)

def norm():
    return Norm().eval(), (torch.randn(2, 3, 16),), None, ({0: "batch", 1: "sequence"},)

def branch():
    return Branch().eval(), (torch.randn(2, 3),)

def bessel():
    return Bessel().eval(), (torch.randn(2, 3),)
"""
"""A norm that fuses, a module that no capture takes, one that torch.onnx has no translation for."""

IN_PYTHON = """
import fxfuse, fxfuse.onnx, models, torch

module, args, kwargs, axes = models.norm()
program = torch.export.export(module, args, dynamic_shapes=({0: torch.export.Dim.AUTO},))
print("fused", fxfuse.report(fxfuse.fuse(program)).counts)
for _ in range(2):
    print("exported", fxfuse.report(fxfuse.onnx.export(module, args, dynamic_shapes=axes)).counts)
for refused in (models.branch, models.bessel):
    try:
        fxfuse.onnx.export(*refused())
    except fxfuse.FxfuseError as error:
        print("refused:", error.what.splitlines()[0], "|", error.where)

from transformers import AutoModelForCausalLM, LlamaConfig
from fxfuse.decoder.export import export_decoder

sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, eos_token_id=None)).eval()
print(*(value.name for value in export_decoder(model, one_token=True).graph.outputs))
"""
STEP = re.compile(r"  [a-z]+ +\d+\.\d s")
"""A stage of the command line, and how long it took."""
LOGGER = logging.getLogger("torch.onnx._internal.exporter._registration")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with default settings for warnings and logging, where the models are."""
    (folder / "models.py").write_text(MODELS)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


def test_fuse_and_export_print_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, "-c", IN_PYTHON)
    # torchao's own, when transformers imports it: from 0.14 on, where its C++ is for another torch.
    assert [line for line in done.stderr.splitlines() if not line.startswith("Skipping import of cpp extensions")] == []
    *others, untranslated, decoder = done.stdout.splitlines()
    assert others == [
        "fused {'RMSNormalization': 1}",
        "exported {'RMSNormalization': 1}",
        "exported {'RMSNormalization': 1}",
        "refused: torch.export.export could not capture the module | Branch",
    ]
    assert untranslated.startswith("refused: torch.onnx cannot translate the program: No ONNX function found for ")
    assert untranslated.endswith(" | bessel_j0, models.py:19 in forward: return torch.special.bessel_j0(x)")
    assert decoder == "logits present.0.key present.0.value"


def test_the_command_prints_its_own_steps(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "fxfuse", "export", "models:norm", "--out", "out")
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if not STEP.fullmatch(line)] == []
    assert "RMSNormalization" in done.stdout and "torch.onnx" not in done.stdout


def test_the_command_prints_one_error(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "fxfuse", "export", "models:branch", "--out", "out")
    assert done.returncode == 2 and done.stdout == ""
    first, *others = (line for line in done.stderr.splitlines() if not STEP.fullmatch(line))
    assert first == "fxfuse: torch.export.export could not capture the module"
    assert "def forward" not in "".join(others)
    assert [line.partition(":")[0] for line in others if line.startswith("  strict")] == [
        "  strict=False",
        "  strict=True",
    ]


def test_only_idle_messages_of_this_thread_are_left_out(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own(op: Any) -> Any:
        return op

    def library(op: Any) -> Any:
        return op

    library.__module__ = "transformers.exporters.exporter_onnx"
    unread = "Failed to infer the signature for function '%s'"
    caplog.set_level(logging.WARNING, logger=LOGGER.name)
    monkeypatch.setattr(LOGGER, "disabled", False)
    LOGGER.addHandler(caplog.handler)
    try:
        with quiet("expected"):
            LOGGER.warning("torchvision is not installed. Skipping %s", "torchvision::nms")
            LOGGER.warning("expected, as it was asked for")
            LOGGER.warning(unread, library)
            LOGGER.warning(unread, own)
            LOGGER.warning("something else")
            thread = threading.Thread(target=LOGGER.warning, args=("torchvision is not installed: another thread",))
            thread.start()
            thread.join()
        LOGGER.warning("torchvision is not installed: after the block")
    finally:
        LOGGER.removeHandler(caplog.handler)
    assert list(dict.fromkeys(record.getMessage() for record in caplog.records)) == [
        f"Failed to infer the signature for function '{own}'",
        "something else",
        "torchvision is not installed: another thread",
        "torchvision is not installed: after the block",
    ]


def test_leaves_are_shared_within_the_block_alone() -> None:
    leaf = pytree.tree_structure(0)
    before = vars(type(leaf)).get("__deepcopy__")
    with shared_specs(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert copy.deepcopy([leaf])[0] is leaf
    assert vars(type(leaf)).get("__deepcopy__") is before


def test_what_a_failed_capture_prints_comes_back(capsys: pytest.CaptureFixture[str]) -> None:
    class Branch(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    def fail() -> str:
        with pytest.raises(Exception, match="data-dependent"):
            torch.export.export(Branch(), (torch.ones(3),), strict=False)
        return capsys.readouterr().err

    with quiet():
        assert "def forward" not in fail()
    assert "def forward" in fail()
    assert "print" not in vars(torch.export._trace)
