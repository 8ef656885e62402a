"""One layer before and after: what is in it, and what became what."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

import fxfuse
from fxfuse.report import layer as layers
from fxfuse.report.layer import Layer
from fxfuse.report.model import Report


@pytest.fixture
def layer(report: Report) -> Layer:
    assert report.layer is not None
    return report.layer


def test_the_first_whole_layer_is_chosen(layer: Layer, report: Report) -> None:
    assert (layer.module, layer.whole) == ("layers.0", True)
    inside = [e for e in report.fused() if e.module is not None and e.module.startswith("layers.0")]
    assert {c.entry for c in layer.before if c.entry is not None} == {report.entries.index(e) for e in inside}


def test_regions_are_the_nodes_of_their_entries(layer: Layer, report: Report) -> None:
    for i in {c.entry for c in layer.before if c.entry is not None}:
        assert {c.name for c in layer.before if c.entry == i} == set(report.entries[i].nodes)
        operators = [c.operator for c in layer.after if c.entry == i]
        assert sum(operator.startswith("fxfuse.") for operator in operators) == 1


def test_what_is_not_fused_is_the_same_on_both_sides(layer: Layer) -> None:
    before = {c.name: c for c in layer.before if c.entry is None}
    after = {c.name: c for c in layer.after if c.entry is None}
    assert after.keys() <= before.keys()
    for name in ("linear", "linear_1", "sigmoid"):
        assert after[name].operator == before[name].operator and after[name].shape == before[name].shape
    assert len(layer.after) < len(layer.before)


def test_calls_say_what_they_are(layer: Layer) -> None:
    call = next(c for c in layer.before if c.label == "sigmoid")
    assert call.operator == "aten.sigmoid.default" and call.shape is not None and call.shape.startswith("float32[")
    assert call.source is not None and "torch.sigmoid(self.gate(x))" in call.source
    names = {c.name for c in layer.before}
    assert {i for c in layer.before for i in c.inputs} - names == {"x"}, "weights and sizes are no inputs"


def test_it_outlives_the_program(layer: Layer) -> None:
    assert pickle.loads(pickle.dumps(layer)) == layer


def test_a_program_without_numbered_layers_is_shown_whole() -> None:
    norm = nn.RMSNorm(8).eval()
    shown = fxfuse.report(fxfuse.fuse(torch.export.export(norm, (torch.randn(2, 8),)))).layer
    assert shown is not None and shown.module is None and shown.whole
    assert [c.label for c in shown.before] == [c.label for c in shown.after] == ["rms_norm"]


def test_nothing_fused_is_nothing_to_show() -> None:
    program = torch.export.export(nn.Linear(8, 8).eval(), (torch.randn(2, 8),))
    assert fxfuse.report(fxfuse.fuse(program)).layer is None


def test_of_a_long_layer_the_stretch_with_the_most_regions_is_kept(
    program: ExportedProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "MAX_CALLS", 5)
    shown = fxfuse.report(fxfuse.fuse(program)).layer
    assert shown is not None and not shown.whole and len(shown.before) == 5
    assert any(c.entry is not None for c in shown.before) and any(c.entry is not None for c in shown.after)


def test_users_of_a_shared_helper_are_drawn_from_it() -> None:
    """The cos of both rotations is sliced once; the second rotation reads what the first put in."""

    class Rotations(nn.Module):
        def forward(
            self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            def rotate(x: torch.Tensor) -> torch.Tensor:
                a, b = x.chunk(2, -1)
                return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

            return rotate(q), rotate(k)

    args = (torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(5, 4), torch.randn(5, 4))
    report = fxfuse.report(fxfuse.fuse(torch.export.export(Rotations().eval(), args)))
    assert report.counts == {"RotaryEmbedding": 2} and report.layer is not None
    after = {c.name: c for c in report.layer.after}
    first, second = (c for c in after.values() if c.operator == "fxfuse.rotary_embedding.default")
    assert {first.entry, second.entry} == {0, 1}
    assert set(first.inputs[1:]) == set(second.inputs[1:]) <= after.keys()


def test_layers_under_no_grad_are_drawn() -> None:
    """The capture keeps them in a submodule; they are fused, and so they are shown."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8))])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                x = self.layers[0](x)
            return x + 1

    shown = fxfuse.report(fxfuse.fuse(torch.export.export(Frozen().eval(), (torch.randn(2, 8),)))).layer
    assert shown is not None and shown.module == "layers.0"
    assert [c.label for c in shown.before if c.entry is not None] == ["rms_norm"]
    assert "linear" in {c.label for c in shown.before} & {c.label for c in shown.after}
