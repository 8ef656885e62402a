"""A plain `torch.onnx.export` that fuses, and that never fails for it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.onnx._internal.exporter import _core

import fxfuse
import fxfuse.onnx
from fxfuse.errors import FxfuseError, FxfuseWarning
from fxfuse.onnx import plugin
from fxfuse.parity import onnxruntime_outputs
from fxfuse.patterns.attention import PATTERN as ATTENTION
from fxfuse.recognise.catalogue import unregister
from tests.test_fusion import Block


class Norm(nn.Module):
    """A norm and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(32) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        return torch.sigmoid(x) * torch.tanh(h)


X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
SHAPES = {"x": {0: "batch", 1: "sequence"}}
FUSED = {"RMSNormalization": 1}


def functions() -> list[Any]:
    return [getattr(_core, name) for name in plugin.HOOKS]


def export(model: Any, **options: Any) -> torch.onnx.ONNXProgram:
    """As anybody calls it; torch's default opset is 20."""
    kwargs = {"dynamic_shapes": SHAPES, "opset_version": 24, "verbose": False, **options}
    result = torch.onnx.export(model, (X,), dynamo=True, **kwargs)
    assert result is not None
    return result


def operators(program: torch.onnx.ONNXProgram) -> list[str]:
    return [node.op_type for node in program.model.graph]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Norm().eval()


@pytest.fixture(scope="module")
def plain(model: nn.Module) -> list[str]:
    """The operators of an export without fxfuse."""
    return operators(export(model))


@pytest.fixture(autouse=True)
def torch_is_left_as_it_was() -> Iterator[None]:
    before = functions()
    yield
    assert functions() == before


@pytest.fixture
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FxfuseWarning)
        yield


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


def test_a_program_is_fused_and_not_changed(model: nn.Module, no_warning: None) -> None:
    program = torch.export.export(model, (X,), dynamic_shapes={"x": {0: Dim.AUTO, 1: Dim.AUTO}})
    before = str(program)
    with fxfuse.onnx.enabled():
        exported = export(program)
    assert fxfuse.report(exported).counts == FUSED
    assert str(program) == before


@pytest.mark.parametrize("opset", [23, 25])
def test_opsets(model: nn.Module, opset: int, no_warning: None) -> None:
    with fxfuse.onnx.enabled():
        exported = export(model, opset_version=opset)
    assert fxfuse.report(exported).counts == FUSED
    assert exported.model.opset_imports[""] == opset


def test_options(model: nn.Module) -> None:
    with fxfuse.onnx.enabled(patterns=[ATTENTION], prove="off"):
        assert fxfuse.report(export(model)).counts == {}


def test_a_program_that_comes_fused_is_written_as_it_is(model: nn.Module, no_warning: None) -> None:
    program = torch.export.export(model, (X,), dynamic_shapes={"x": {0: Dim.AUTO, 1: Dim.AUTO}})
    fused = fxfuse.fuse(program)
    with fxfuse.onnx.enabled():
        exported = export(fused)
    assert fxfuse.report(exported) is fxfuse.report(fused)
    assert "RMSNormalization" in operators(exported)


def test_the_callers_translations_win(model: nn.Module) -> None:
    from onnxscript.onnx_opset import opset24

    def spelled_out(X: Any, scale: Any, *, axis: int = -1, epsilon: float = 1e-05, stash_type: int = 1) -> Any:
        return opset24.Mul(opset24.LpNormalization(X, axis=axis), scale)

    with fxfuse.onnx.enabled():
        exported = export(model, custom_translation_table={torch.ops.fxfuse.rms_norm.default: spelled_out})
    assert "LpNormalization" in operators(exported) and "RMSNormalization" not in operators(exported)


def test_our_own_export_is_not_fused_twice(model: nn.Module, no_warning: None) -> None:
    with fxfuse.onnx.enabled():
        fused = fxfuse.onnx.export(model, (X,), dynamic_shapes=SHAPES)
        nothing = fxfuse.onnx.export(model, (X,), dynamic_shapes=SHAPES, patterns=[])
    assert fxfuse.report(fused).counts == FUSED and operators(fused).count("RMSNormalization") == 1
    assert fxfuse.report(nothing).counts == {} and "RMSNormalization" not in operators(nothing)


def test_without_any_patching(model: nn.Module) -> None:
    program = torch.export.export(model, (X,), dynamic_shapes={"x": {0: Dim.AUTO, 1: Dim.AUTO}})
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


def test_install_and_uninstall(model: nn.Module, no_warning: None) -> None:
    before = functions()
    fxfuse.onnx.uninstall()  # nothing to end
    fxfuse.onnx.install()
    try:
        once = functions()
        fxfuse.onnx.install(patterns=[ATTENTION])
        assert functions() == once and not set(once) & set(before)
        assert fxfuse.report(export(model)).counts == {}
    finally:
        fxfuse.onnx.uninstall()
    assert functions() == before
    fxfuse.onnx.uninstall()
    assert functions() == before


def test_blocks_nest(model: nn.Module) -> None:
    before = functions()
    with fxfuse.onnx.enabled():
        with fxfuse.onnx.enabled(patterns=[]):
            fxfuse.onnx.install()
            fxfuse.onnx.uninstall()
            assert fxfuse.report(export(model)).counts == {}
        assert fxfuse.report(export(model)).counts == FUSED
    assert functions() == before


def test_an_exception_ends_the_block(model: nn.Module) -> None:
    before = functions()
    with pytest.raises(torch.onnx.OnnxExporterError), fxfuse.onnx.enabled():
        torch.onnx.export(model, (X, X, X), dynamo=True, opset_version=24, verbose=False)
    with pytest.raises(KeyError), fxfuse.onnx.enabled():
        raise KeyError
    assert functions() == before


def test_a_block_is_its_threads_own(model: nn.Module, plain: list[str]) -> None:
    """One thread fuses all, one nothing it knows, one is in no block, at the same time."""
    found: dict[str, Any] = {}
    together = threading.Barrier(2, timeout=60)

    def within(name: str, **options: Any) -> None:
        with fxfuse.onnx.enabled(**options):
            together.wait()  # both are in their blocks
            for_all.acquire()  # torch's own exporter is not safe to run twice at a time
            try:
                found[name] = fxfuse.report(export(model)).counts
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
        outside = threading.Thread(target=lambda: found.update(outside=operators(export(model))))
        outside.start()
        outside.join()
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


def test_what_others_wrap_meanwhile_stays_theirs(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
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
        fxfuse.report(export(model))
    with fxfuse.onnx.enabled():
        assert fxfuse.report(export(model)).counts == FUSED
    assert getattr(_core, name) is theirs and len(calls) == 2
    monkeypatch.undo()
    assert getattr(_core, name) is ours
    with fxfuse.onnx.enabled():
        assert getattr(_core, name) is ours


# ---- where it does not


@pytest.mark.parametrize("opset", [18, None, 26])
def test_another_opset_is_exported_as_ever(model: nn.Module, opset: int | None) -> None:
    expected = operators(export(model, opset_version=opset))
    said = f"for opset {opset or 20}.*23 to 25.*opset_version=24"
    with pytest.warns(FxfuseWarning, match=said) as caught, fxfuse.onnx.enabled():
        assert operators(export(model, opset_version=opset)) == expected
        if opset is None:
            export(model, opset_version=opset)  # says no more
    (warning,) = [w for w in caught if w.category is FxfuseWarning]
    assert warning.filename == __file__, "it points at the call"


class Failing:
    """A pattern with a mistake in it."""

    name = operator = "failing"
    since_opset = 23

    def propose(self, view: Any, ask: Any) -> Any:
        raise ZeroDivisionError("a mistake in a pattern")

    def recognise(self, region: Any, ask: Any) -> Any:
        raise AssertionError


def test_when_fusing_fails_it_exports_as_ever(model: nn.Module, plain: list[str]) -> None:
    with (
        pytest.warns(FxfuseWarning, match=r"fusing failed \(ZeroDivisionError: a mistake"),
        fxfuse.onnx.enabled(patterns=[Failing()]),
    ):
        exported = export(model)
    assert operators(exported) == plain
    with pytest.raises(FxfuseError, match="no fusion report"):
        fxfuse.report(exported)


@pytest.fixture
def gate() -> Iterator[Callable[[Any], Any]]:
    """Gives a pattern whose replacement is an operator with this translation to ONNX, if any."""
    library = torch.library.Library("fxfuse_test_plugin", "FRAGMENT")
    library.define("gate(Tensor x, Tensor h) -> Tensor")
    library.impl("gate", lambda x, h: torch.sigmoid(x) * torch.tanh(h), "CompositeExplicitAutograd")

    @fxfuse.pattern(replacement=torch.ops.fxfuse_test_plugin.gate)
    def gate(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x) * torch.tanh(h)

    unregister("gate")
    yield gate
    library._destroy()


def test_when_translation_fails_it_exports_as_ever(model: nn.Module, plain: list[str], gate: Any) -> None:
    with (
        pytest.warns(FxfuseWarning, match="could not translate the fused program") as caught,
        fxfuse.onnx.enabled(patterns=[gate]),
    ):
        exported = export(model)
    assert operators(exported) == plain
    assert len([w for w in caught if w.category is FxfuseWarning]) == 1


def test_when_decomposition_fails_it_exports_as_ever(
    model: nn.Module, plain: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decompose = ExportedProgram.run_decompositions

    def failing(self: ExportedProgram, table: Any = None, **kwargs: Any) -> ExportedProgram:
        if any("fxfuse" in str(node.target) for node in self.graph.nodes):
            raise RuntimeError("torch cannot retrace it")
        return decompose(self, table, **kwargs)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", failing)
    with (
        pytest.warns(FxfuseWarning, match=r"could not decompose .*\(RuntimeError: torch cannot retrace it"),
        fxfuse.onnx.enabled(),
    ):
        exported = export(model)
    assert operators(exported) == plain


def test_errors_of_the_model_are_torchs_own() -> None:
    class Unknown(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.matrix_exp(x)

    with pytest.raises(torch.onnx.OnnxExporterError) as without:
        export(Unknown().eval(), dynamic_shapes=None)
    with pytest.raises(torch.onnx.OnnxExporterError) as within, fxfuse.onnx.enabled(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FxfuseWarning)
        export(Unknown().eval(), dynamic_shapes=None)
    assert str(within.value) == str(without.value)


@pytest.mark.parametrize("name", plugin.HOOKS)
@pytest.mark.parametrize("change", ["gone", "another signature"])
def test_an_unfamiliar_torch_is_left_alone(name: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if change == "gone":
        monkeypatch.delattr(_core, name)
    else:
        monkeypatch.setattr(_core, name, lambda program, table: None)
    now = {name: getattr(_core, name, None) for name in plugin.HOOKS}
    with pytest.warns(FxfuseWarning, match=f"will not fuse: .*{name}") as caught, fxfuse.onnx.enabled():
        assert {name: getattr(_core, name, None) for name in plugin.HOOKS} == now
    assert caught[0].filename == __file__


@pytest.mark.parametrize("door", [fxfuse.onnx.install, lambda **options: fxfuse.onnx.enabled(**options).__enter__()])
def test_bad_options_are_refused_at_once(door: Callable[..., Any]) -> None:
    before = functions()
    with pytest.raises(FxfuseError, match="prove"):
        door(prove="maybe")
    with pytest.raises(FxfuseError, match=r"(?s)'rms_norm' is not a pattern.*PATTERN"):
        door(patterns=["rms_norm"])
    assert functions() == before
