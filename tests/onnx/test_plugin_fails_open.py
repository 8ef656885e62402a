"""Where a plain `torch.onnx.export` cannot be fused, it exports as ever, and one warning says why."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.onnx._internal.exporter import _core

import fxfuse
import fxfuse.onnx
from fxfuse.errors import FxfuseError, FxfuseWarning
from fxfuse.onnx import hooks, plugin
from fxfuse.recognise.catalogue import unregister
from tests.onnx import plain_export
from tests.onnx.plain_export import export, functions, operators


@pytest.mark.parametrize("opset", [18, None, 26])
def test_another_opset_is_exported_as_ever(norm: nn.Module, opset: int | None) -> None:
    expected = operators(export(norm, opset_version=opset))
    said = f"for opset {opset or 20}.*23 to 25.*opset_version=24"
    with pytest.warns(FxfuseWarning, match=said) as caught, fxfuse.onnx.enabled():
        assert operators(export(norm, opset_version=opset)) == expected
        if opset is None:
            export(norm, opset_version=opset)  # says no more
    (warning,) = [w for w in caught if w.category is FxfuseWarning]
    assert warning.filename == plain_export.__file__, "it points at the call"


def test_when_fusing_fails_it_exports_as_ever(
    norm: nn.Module, plain: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any, **kwargs: Any) -> ExportedProgram:
        raise ZeroDivisionError("a mistake in fxfuse")

    monkeypatch.setattr(hooks, "fuse_with", failing)
    with (
        pytest.warns(FxfuseWarning, match=r"fusing failed \(ZeroDivisionError: a mistake"),
        fxfuse.onnx.enabled(),
    ):
        exported = export(norm)
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


def test_when_translation_fails_it_exports_as_ever(norm: nn.Module, plain: list[str], gate: Any) -> None:
    with (
        pytest.warns(FxfuseWarning, match="could not translate the fused program") as caught,
        fxfuse.onnx.enabled(patterns=[gate]),
    ):
        exported = export(norm)
    assert operators(exported) == plain
    assert len([w for w in caught if w.category is FxfuseWarning]) == 1


def test_when_decomposition_fails_it_exports_as_ever(
    norm: nn.Module, plain: list[str], monkeypatch: pytest.MonkeyPatch
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
        exported = export(norm)
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
