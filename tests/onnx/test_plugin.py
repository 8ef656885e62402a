"""A plain `torch.onnx.export` fuses: where fxfuse is installed, and in the blocks and threads where it is enabled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.onnx._internal.exporter import _core

import fxfuse
import fxfuse.onnx
from fxfuse.errors import FxfuseError
from fxfuse.parity import onnxruntime_outputs
from fxfuse.patterns.attention import PATTERN as ATTENTION
from tests.onnx.plain_export import FUSED, SHAPES, X, export, functions, operators
from tests.test_fusion import Block

# ---- what fuses


def test_a_plain_export_fuses(no_warning: None) -> None:
    model = Block().eval()
    with fxfuse.onnx.enabled():
        exported = export(model)
    assert fxfuse.report(exported).counts == {"RMSNormalization": 1, "Attention": 1}
    assert operators(exported).count("RMSNormalization") == operators(exported).count("Attention") == 1
    assert operators(exported) == operators(fxfuse.onnx.export(model, (X,), dynamic_shapes=SHAPES))
    (x,) = exported.model.graph.inputs
    assert [str(dim) for dim in x.shape] == ["batch", "sequence", "32"]
    for shape in ((2, 5, 32), (3, 1, 32)):
        x = torch.randn(shape)
        torch.testing.assert_close(onnxruntime_outputs(exported, [x]), [model(x)], rtol=1e-4, atol=1e-5)


def test_a_program_is_fused_and_not_changed(norm: nn.Module, no_warning: None) -> None:
    program = torch.export.export(norm, (X,), dynamic_shapes={"x": {0: Dim.AUTO, 1: Dim.AUTO}})
    before = str(program)
    with fxfuse.onnx.enabled():
        exported = export(program)
    assert fxfuse.report(exported).counts == FUSED
    assert str(program) == before


@pytest.mark.parametrize("opset", [23, 25])
def test_opsets(norm: nn.Module, opset: int, no_warning: None) -> None:
    with fxfuse.onnx.enabled():
        exported = export(norm, opset_version=opset)
    assert fxfuse.report(exported).counts == FUSED
    assert exported.model.opset_imports[""] == opset


def test_options(norm: nn.Module) -> None:
    with fxfuse.onnx.enabled(patterns=[ATTENTION], prove="off"):
        assert fxfuse.report(export(norm)).counts == {}


def test_a_program_that_comes_fused_is_written_as_it_is(norm: nn.Module, no_warning: None) -> None:
    program = torch.export.export(norm, (X,), dynamic_shapes={"x": {0: Dim.AUTO, 1: Dim.AUTO}})
    fused = fxfuse.fuse(program)
    with fxfuse.onnx.enabled():
        exported = export(fused)
    assert fxfuse.report(exported) is fxfuse.report(fused)
    assert "RMSNormalization" in operators(exported)


def test_the_callers_translations_win(norm: nn.Module) -> None:
    from onnxscript.onnx_opset import opset24

    def spelled_out(X: Any, scale: Any, *, axis: int = -1, epsilon: float = 1e-05, stash_type: int = 1) -> Any:
        return opset24.Mul(opset24.LpNormalization(X, axis=axis), scale)

    with fxfuse.onnx.enabled():
        exported = export(norm, custom_translation_table={torch.ops.fxfuse.rms_norm.default: spelled_out})
    assert "LpNormalization" in operators(exported) and "RMSNormalization" not in operators(exported)


def test_translations_that_torch_lacks_are_there(no_warning: None) -> None:
    class Quantile(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.erfinv(x)

    with fxfuse.onnx.enabled():
        assert "Erf" in operators(export(Quantile().eval()))


def test_our_own_export_is_not_fused_twice(norm: nn.Module, no_warning: None) -> None:
    with fxfuse.onnx.enabled():
        fused = fxfuse.onnx.export(norm, (X,), dynamic_shapes=SHAPES)
        nothing = fxfuse.onnx.export(norm, (X,), dynamic_shapes=SHAPES, patterns=[])
    assert fxfuse.report(fused).counts == FUSED and operators(fused).count("RMSNormalization") == 1
    assert fxfuse.report(nothing).counts == {} and "RMSNormalization" not in operators(nothing)


def test_without_any_patching(norm: nn.Module) -> None:
    program = torch.export.export(norm, (X,), dynamic_shapes={"x": {0: Dim.AUTO, 1: Dim.AUTO}})
    exported = export(fxfuse.fuse(program), custom_translation_table=fxfuse.onnx.translation_table())
    assert operators(exported).count("RMSNormalization") == 1


class Masks(nn.Module):
    """Masks combined by `where`, for which ONNX Runtime has no kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x > 0, x > 1
        return nn.functional.rms_norm(x, (32,), None, 1e-5).masked_fill(torch.where(b, a.logical_not(), a), 0.0)


@pytest.mark.parametrize("verify", [False, True])
def test_torchs_report_and_verification(verify: bool, tmp_path: Path, no_warning: None) -> None:
    with fxfuse.onnx.enabled():
        exported = export(Masks().eval(), report=True, verify=verify, artifacts_dir=tmp_path)
    assert fxfuse.report(exported).counts == {"RMSNormalization": 1}
    (written,) = tmp_path.glob("onnx_export_*_success.md")
    checks = ("Execute the model with ONNX Runtime", "Validate model output accuracy")
    assert [f"✅ {check}" in written.read_text() for check in checks] == [verify, verify]
    assert "fxfuse.rms_norm" in written.read_text()


# ---- where it fuses


def in_a_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def test_install_and_uninstall(norm: nn.Module, no_warning: None) -> None:
    before, found = functions(), []
    fxfuse.onnx.uninstall()  # nothing to end
    fxfuse.onnx.install()
    try:
        once = functions()
        in_a_thread(lambda: found.append(fxfuse.report(export(norm)).counts))
        fxfuse.onnx.install(patterns=[ATTENTION])
        assert functions() == once and not set(once) & set(before)
        found.append(fxfuse.report(export(norm)).counts)
    finally:
        fxfuse.onnx.uninstall()
    assert found == [FUSED, {}]
    assert functions() == before
    fxfuse.onnx.uninstall()
    assert functions() == before


def test_blocks_nest(norm: nn.Module) -> None:
    before = functions()
    with fxfuse.onnx.enabled():
        with fxfuse.onnx.enabled(patterns=[]):
            fxfuse.onnx.install()
            fxfuse.onnx.uninstall()
            assert fxfuse.report(export(norm)).counts == {}
        assert fxfuse.report(export(norm)).counts == FUSED
    assert functions() == before


def test_an_exception_ends_the_block(norm: nn.Module) -> None:
    before = functions()
    with pytest.raises(torch.onnx.OnnxExporterError), fxfuse.onnx.enabled():
        torch.onnx.export(norm, (X, X, X), dynamo=True, opset_version=24, verbose=False)
    with pytest.raises(KeyError), fxfuse.onnx.enabled():
        raise KeyError
    assert functions() == before


def test_a_block_is_its_threads_own(norm: nn.Module, plain: list[str]) -> None:
    """One thread fuses all, one nothing it knows, one is in no block, at the same time."""
    found: dict[str, Any] = {}
    together = threading.Barrier(2, timeout=60)

    def within(name: str, **options: Any) -> None:
        with fxfuse.onnx.enabled(**options):
            together.wait()  # both are in their blocks
            for_all.acquire()  # torch's own exporter is not safe to run twice at a time
            try:
                found[name] = fxfuse.report(export(norm)).counts
            finally:
                for_all.release()
            together.wait()

    for_all = threading.Lock()
    with fxfuse.onnx.enabled():
        threads = [
            threading.Thread(target=within, args=("all",)),
            threading.Thread(target=within, args=("nothing",), kwargs={"patterns": []}),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        in_a_thread(lambda: found.update(outside=operators(export(norm))))
    assert found == {"all": FUSED, "nothing": {}, "outside": plain}


def test_many_threads_come_and_go() -> None:
    before = functions()

    def come_and_go() -> None:
        for _ in range(200):
            with fxfuse.onnx.enabled():
                fxfuse.onnx.install()
                fxfuse.onnx.uninstall()

    threads = [threading.Thread(target=come_and_go) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert functions() == before


def test_what_others_wrap_meanwhile_stays_theirs(norm: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken out from under somebody else's wrapper, ours does nothing; put in again, it fuses once."""
    name = "_prepare_exported_program_for_export"
    calls = []
    fxfuse.onnx.install()
    ours = getattr(_core, name)

    def theirs(ep: ExportedProgram, *, registry: Any) -> ExportedProgram:
        calls.append(ep)
        return ours(ep, registry=registry)

    monkeypatch.setattr(_core, name, theirs)
    fxfuse.onnx.uninstall()
    assert getattr(_core, name) is theirs
    with pytest.raises(FxfuseError, match="no fusion report"):
        fxfuse.report(export(norm))
    with fxfuse.onnx.enabled():
        assert fxfuse.report(export(norm)).counts == FUSED
    assert getattr(_core, name) is theirs and len(calls) == 2
    monkeypatch.undo()
    assert getattr(_core, name) is ours
    with fxfuse.onnx.enabled():
        assert getattr(_core, name) is ours
