"""`fxfuse.prepass` on functions that export, and on modules that are exported."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

import fxfuse
import fxfuse.onnx
from fxfuse.errors import FxfuseError
from fxfuse.patterns.attention import PATTERN as ATTENTION
from fxfuse.patterns.rms_norm import PATTERN as RMS_NORM
from fxfuse.prepass import _instances, options_of

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
BY_NAME = {"x": {0: Dim("batch", max=16), 1: Dim.AUTO}}
FUSED = {"RMSNormalization": 1}


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: torch.Tensor, *, double: bool = False) -> torch.Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        return y * 2 if double else y


def counts(program: Any) -> dict[str, int]:
    return fxfuse.report(program).counts


# ---- functions


def test_torchs_own_export() -> None:
    export = fxfuse.prepass(torch.export.export)
    program = export(Norm(), (X,), dynamic_shapes=BY_NAME)
    assert counts(program) == FUSED
    assert program.module()(torch.randn(7, 3, 8)).shape == (7, 3, 8)
    assert inspect.signature(export) == inspect.signature(torch.export.export)
    assert (export.__name__, export.__doc__) == ("export", torch.export.export.__doc__)


def test_a_function_of_the_users() -> None:
    @fxfuse.prepass
    def capture(module: nn.Module, batch: int = 2) -> ExportedProgram:
        """Capture it."""
        return torch.export.export(module, (X[:batch],), dynamic_shapes=BY_NAME)

    @fxfuse.prepass(opset=23, patterns=[ATTENTION], prove="off")
    def other(module: nn.Module) -> ExportedProgram:
        return torch.export.export(module, (X,))

    assert counts(capture(Norm())) == FUSED and capture.__doc__ == "Capture it."
    assert list(inspect.signature(capture).parameters) == ["module", "batch"]
    assert counts(other(Norm())) == {} and fxfuse.report(other(Norm())).opset == 23


def test_methods_and_callables() -> None:
    class Exporter:
        def __init__(self, module: nn.Module) -> None:
            self.module = module

        @fxfuse.prepass
        def method(self, x: torch.Tensor) -> ExportedProgram:
            return torch.export.export(self.module, (x,))

        @fxfuse.prepass
        @staticmethod
        def static(module: nn.Module, x: torch.Tensor) -> ExportedProgram:
            return torch.export.export(module, (x,))

    assert counts(Exporter(Norm()).method(X)) == FUSED
    assert counts(Exporter.static(Norm(), X)) == FUSED
    assert counts(fxfuse.prepass(functools.partial(torch.export.export, args=(X,)))(Norm())) == FUSED


def test_twice_is_once_as_the_outer_says() -> None:
    nothing = fxfuse.prepass(fxfuse.prepass(torch.export.export), patterns=[ATTENTION])
    assert counts(nothing(Norm(), (X,))) == {}

    @functools.wraps(nothing)  # copies the attributes of what it wraps, and must not be taken for it
    def logged(*args: Any) -> ExportedProgram:
        calls.append(args)
        return nothing(*args)

    calls: list[Any] = []
    with pytest.raises(FxfuseError, match="fused already"):
        fxfuse.prepass(logged)(Block(), (X,))
    assert len(calls) == 1


class Block(Norm):
    """Fuses under `patterns=[ATTENTION]` too."""

    def forward(self, x: torch.Tensor, *, double: bool = False) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x[:, None], x.flip(-1)[:, None], (x + 1)[:, None])


def test_only_programs() -> None:
    @fxfuse.prepass
    def build() -> nn.Module:
        return Norm()

    with pytest.raises(FxfuseError, match=r"(?s)returned a Norm.*test_only_programs.<locals>.build"):
        build()


@pytest.mark.parametrize("target", [3, "model", int, torch.export.export(Norm(), (X,))], ids=lambda t: type(t).__name__)
def test_other_targets_are_refused(target: Any) -> None:
    with pytest.raises(FxfuseError, match="prepass takes a function"):
        fxfuse.prepass(target)


def test_bad_options_are_refused_at_once() -> None:
    for options in ({"opset": 22}, {"patterns": ["rms_norm"]}, {"patterns": 3}, {"verify": "maybe"}):
        with pytest.raises(FxfuseError, match=next(iter(options))):
            fxfuse.prepass(**options)


# ---- modules


def marked_instance() -> nn.Module:
    return fxfuse.prepass(Norm(), opset=23, patterns=[RMS_NORM])


@fxfuse.prepass(opset=23, patterns=[RMS_NORM])
class Marked(Norm):
    """Marked, and so are its subclasses."""


class Derived(Marked):
    pass


class Gated(Norm):
    """Two things to fuse."""

    def forward(self, x: torch.Tensor, *, double: bool = False) -> torch.Tensor:
        h = super().forward(x)[:, None]
        return nn.functional.scaled_dot_product_attention(h, x.flip(-1)[:, None], (x + 1)[:, None])


@pytest.mark.parametrize("make", [marked_instance, Marked, Derived])
def test_a_mark_changes_nothing(make: Any) -> None:
    module, plain = make(), Norm()
    module.load_state_dict(plain.state_dict())
    assert vars(module).keys() == vars(plain).keys() and module.state_dict().keys() == plain.state_dict().keys()
    assert type(module).forward is Norm.forward and "forward" not in vars(module)
    assert torch.equal(module(X), plain(X)) and torch.equal(module(X, double=True), plain(X, double=True))
    assert b"fxfuse" not in pickle.dumps(module)
    assert torch.equal(pickle.loads(pickle.dumps(module))(X), plain(X))
    program = torch.export.export(module, (X,), dynamic_shapes=BY_NAME)  # marked is not fused
    assert "fxfuse" not in str(program.graph)


@pytest.mark.parametrize("make", [marked_instance, Marked, Derived])
def test_the_exporters_read_the_mark(make: Any) -> None:
    ours = fxfuse.onnx.export(make().eval(), (X,))
    assert ours.model.opset_imports[""] == fxfuse.report(ours).opset == 23


def test_the_plugin_reads_the_mark() -> None:
    module = fxfuse.prepass(Gated().eval(), patterns=[RMS_NORM])
    with fxfuse.onnx.enabled():
        marked = torch.onnx.export(module, (X,), dynamo=True, opset_version=24, verbose=False)
        other = torch.onnx.export(Gated().eval(), (X,), dynamo=True, opset_version=24, verbose=False)
    assert counts(marked) == FUSED
    assert counts(other) == {**FUSED, "Attention": 1}


def test_arguments_go_before_the_mark() -> None:
    module = fxfuse.prepass(Gated().eval(), opset=23, patterns=[RMS_NORM], prove="off")
    ours = fxfuse.onnx.export(module, (X,), opset_version=24, patterns=[ATTENTION], prove="on")
    assert counts(ours) == {"Attention": 1} and ours.model.opset_imports[""] == 24


def test_an_instance_goes_before_its_class_and_its_copies_have_the_classes_mark() -> None:
    module = fxfuse.prepass(Derived(), opset=25)
    assert options_of(module).opset == 25  # type: ignore[union-attr]
    assert options_of(copy.deepcopy(module)).opset == options_of(Derived()).opset == 23  # type: ignore[union-attr]
    assert options_of(Norm()) is None and options_of(3) is None
    fxfuse.prepass(module, opset=24)
    assert options_of(module).opset == 24  # type: ignore[union-attr]


def test_a_mark_keeps_no_module_alive() -> None:
    gc.collect()
    before = len(_instances)
    module = marked_instance()
    assert len(_instances) == before + 1
    del module
    gc.collect()
    assert len(_instances) == before


def test_modules_that_define_equality() -> None:
    class Equal(Norm):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Equal)

        __hash__ = None  # type: ignore[assignment]

    one, other = fxfuse.prepass(Equal(), opset=23), Equal()
    assert options_of(one) is not None and options_of(other) is None
