"""A fused program goes wherever another goes: into a file, a compiler, a training loop, and back to plain ATen."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.export import Dim, ExportedProgram
from torchtune.models.llama3_2 import llama3_2

import fxfuse
from fxfuse.ops import OPS, holds_fused

TOKENS = torch.arange(10).reshape(2, 5)
OTHERS = [torch.randint(0, 32, shape, generator=torch.Generator().manual_seed(1)) for shape in ((3, 7), (1, 4))]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return llama3_2(
        vocab_size=32, num_layers=1, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=64, intermediate_dim=48
    ).eval()


@pytest.fixture(scope="module")
def program(model: nn.Module) -> ExportedProgram:
    return torch.export.export(model, (TOKENS,), dynamic_shapes={"tokens": {0: Dim.AUTO, 1: Dim.AUTO}})


@pytest.fixture(scope="module")
def fused(program: ExportedProgram) -> ExportedProgram:
    fused = fxfuse.fuse(program)
    assert fxfuse.report(fused).counts == {"RMSNormalization": 3, "RotaryEmbedding": 2, "Attention": 1}
    return fused


def elsewhere(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh Python, in a folder that is no checkout."""
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)


# ---- files

LOAD_AND_RUN = "torch.export.load('fused.pt2').module()(torch.arange(10).reshape(2, 5)).double().sum().item()"


def test_a_saved_program_runs_where_fxfuse_is_imported(fused: ExportedProgram, tmp_path: Path) -> None:
    torch.export.save(fused, tmp_path / "fused.pt2")
    there = elsewhere(f"import torch, fxfuse; print({LOAD_AND_RUN})", tmp_path)
    assert there.returncode == 0, there.stderr
    assert float(there.stdout) == pytest.approx(fused.module()(TOKENS).double().sum().item(), rel=1e-6)


def test_where_it_is_not_torch_names_the_operator(fused: ExportedProgram, tmp_path: Path) -> None:
    torch.export.save(fused, tmp_path / "fused.pt2")
    there = elsewhere(f"import torch; print({LOAD_AND_RUN})", tmp_path)
    assert there.returncode != 0 and not there.stdout
    assert "failed to resolve torch.ops.fxfuse.rms_norm.default" in there.stderr
    assert "import the custom op" in there.stderr


def test_a_copy_and_a_loaded_program_can_be_copied_and_decomposed(fused: ExportedProgram, tmp_path: Path) -> None:
    torch.export.save(fused, tmp_path / "fused.pt2")
    loaded = torch.export.load(tmp_path / "fused.pt2")
    for program in (copy.deepcopy(fused), loaded, loaded.run_decompositions()):
        assert holds_fused(program)
        for tokens in (TOKENS, *OTHERS):
            torch.testing.assert_close(program.module()(tokens), fused.module()(tokens))


def test_a_fused_module_can_be_exported_again(model: nn.Module, fused: ExportedProgram) -> None:
    again = torch.export.export(fused.module(), (TOKENS,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    assert [n.target for n in again.graph.nodes if n.target in OPS] == [
        n.target for n in fused.graph.nodes if n.target in OPS
    ]
    for tokens in OTHERS:
        torch.testing.assert_close(again.module()(tokens), model(tokens))


# ---- plain ATen


def test_unfused_it_needs_no_fxfuse(model: nn.Module, fused: ExportedProgram, tmp_path: Path) -> None:
    plain = fxfuse.unfuse(fused)
    assert not holds_fused(plain)
    operators = [n.target for n in plain.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert {operator.namespace for operator in operators} == {"aten"}
    for tokens in (TOKENS, *OTHERS):
        torch.testing.assert_close(plain.module()(tokens), model(tokens))
    torch.export.save(plain, tmp_path / "fused.pt2")
    there = elsewhere(f"import sys, torch; print({LOAD_AND_RUN}); assert 'fxfuse' not in sys.modules", tmp_path)
    assert there.returncode == 0, there.stderr


def test_unfusing_changes_nothing_of_the_callers(fused: ExportedProgram) -> None:
    before = str(fused)
    fxfuse.unfuse(fused)
    assert str(fused) == before


# ---- compilers


@needs_compiler
def test_torch_compile_takes_it_whole(model: nn.Module, fused: ExportedProgram) -> None:
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(fused.module(), fullgraph=True, dynamic=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_torch_compile_takes_its_gradients(program: ExportedProgram, fused: ExportedProgram) -> None:
    torch._dynamo.reset()
    module, plain = copy.deepcopy(fused).module(), copy.deepcopy(program).module()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for run in (compiled, plain):
        run(TOKENS).square().mean().backward()
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(module.get_parameter(name).grad, weight.grad, msg=lambda m, n=name: f"{n}: {m}")


@needs_compiler
def test_aot_inductor(model: nn.Module, fused: ExportedProgram, tmp_path: Path) -> None:
    package = torch._inductor.aoti_compile_and_package(fused, package_path=str(tmp_path / "fused_aoti.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for tokens in (TOKENS, *OTHERS):
        torch.testing.assert_close(loaded(tokens), model(tokens))
    there = elsewhere("import torch; torch._inductor.aoti_load_package('fused_aoti.pt2')", tmp_path)
    assert there.returncode != 0 and "fxfuse::rms_norm" in there.stderr


# ---- training


def trained(module: nn.Module, steps: int = 8) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of AdamW on one batch, and the weights in the end."""
    tokens = torch.randint(0, 32, (3, 7), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(module(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for name, weight in module.named_parameters():
            assert weight.grad is not None and weight.grad.abs().max() > 0, name
        optimizer.step()
        losses.append(loss.item())
    return losses, dict(module.named_parameters())


def test_it_trains_like_the_unfused_program(program: ExportedProgram, fused: ExportedProgram) -> None:
    losses, weights = trained(copy.deepcopy(program).module())
    assert losses[-1] < 0.9 * losses[0]
    fused_losses, fused_weights = trained(copy.deepcopy(fused).module())
    assert fused_losses == pytest.approx(losses, rel=1e-5)
    assert fused_weights.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(fused_weights[name], weight, msg=lambda m, n=name: f"{n}: {m}")
