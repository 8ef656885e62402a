"""`frozen`, `accept` and `budget` at every door: what ends in ONNX takes buffers for constants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

import fxfuse
import fxfuse.onnx
from fxfuse.cli import main
from fxfuse.errors import FxfuseError
from fxfuse.options import Options

X = torch.randn(2, 5, 4, 16)
ANGLES = torch.randn(5, 8)
AXES = ({0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO})


class Model(nn.Module):
    """A rotation whose signs are a persistent buffer, and a norm that bounds what it squares."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sign", torch.tensor([-1.0] * 8 + [1.0] * 8))

    def forward(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        e = torch.cat([angles, angles], -1)[:, None]
        y = x * e.cos() + torch.cat([x[..., 8:], x[..., :8]], -1) * self.sign * e.sin()
        return y * torch.rsqrt(y.clamp(-1e5, 1e5).pow(2).mean(-1, keepdim=True) + 1e-5)


BOTH = {"RotaryEmbedding": 1, "RMSNormalization": 1}


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    return torch.export.export(Model().eval(), (X, ANGLES), dynamic_shapes=AXES)


@pytest.fixture(scope="module")
def name(program: ExportedProgram) -> str:
    (entry,) = fxfuse.report(fxfuse.fuse(program)).refused("RMSNormalization")
    return str(entry.name)


def counts(program: Any) -> dict[str, int]:
    return fxfuse.report(program).counts


def plain_export(model: Any) -> Any:
    return torch.onnx.export(
        model, (X, ANGLES), dynamic_shapes=AXES, dynamo=True, opset_version=24, verbose=False, report=False
    )


def test_a_program_stays_one(program: ExportedProgram, name: str) -> None:
    assert counts(fxfuse.fuse(program)) == {}
    assert counts(fxfuse.fuse(program, frozen=True, accept=[name])) == BOTH
    export = fxfuse.prepass(torch.export.export, accept=[name])
    assert counts(export(Model().eval(), (X, ANGLES), dynamic_shapes=AXES)) == {"RMSNormalization": 1}
    export = fxfuse.prepass(torch.export.export, frozen=True, accept=[name])
    assert counts(export(Model().eval(), (X, ANGLES), dynamic_shapes=AXES)) == BOTH


def test_what_ends_in_onnx_is_frozen(program: ExportedProgram, name: str) -> None:
    def export(**options: Any) -> dict[str, int]:
        return counts(fxfuse.onnx.export(program, dynamic_shapes=None, **options))

    assert export() == {"RotaryEmbedding": 1}
    assert export(frozen=False) == {}
    assert export(accept=[name]) == BOTH
    assert export(budget=1e-9) == {}
    with fxfuse.onnx.enabled():
        assert counts(plain_export(program)) == {"RotaryEmbedding": 1}
    with fxfuse.onnx.enabled(accept=[name], frozen=False):
        assert counts(plain_export(program)) == {"RMSNormalization": 1}
    fxfuse.onnx.install(accept=[name], budget=30.0)
    try:
        assert counts(plain_export(program)) == BOTH
    finally:
        fxfuse.onnx.uninstall()


def test_a_mark_says_it(name: str) -> None:
    model = fxfuse.prepass(Model().eval(), accept=[name], budget=30.0)
    assert counts(fxfuse.onnx.export(model, (X, ANGLES), dynamic_shapes=AXES)) == BOTH
    assert counts(fxfuse.onnx.export(model, (X, ANGLES), dynamic_shapes=AXES, accept=[])) == {"RotaryEmbedding": 1}
    with fxfuse.onnx.enabled():
        assert counts(plain_export(model)) == BOTH
    loose = fxfuse.prepass(Model().eval(), frozen=False)
    assert counts(fxfuse.onnx.export(loose, (X, ANGLES), dynamic_shapes=AXES)) == {}


def test_the_file_computes_what_the_model_does(name: str, tmp_path: Path) -> None:
    from fxfuse.parity import onnxruntime_outputs

    model = Model().eval()
    exported = fxfuse.onnx.export(model, (X, ANGLES), dynamic_shapes=AXES, accept=[name])
    x, angles = torch.randn(3, 7, 4, 16), torch.randn(7, 8)
    torch.testing.assert_close(onnxruntime_outputs(exported, [x, angles]), [model(x, angles)], rtol=1e-4, atol=1e-5)


def test_the_command_line(
    program: ExportedProgram, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.export.save(program, tmp_path / "m.pt2")
    source = str(tmp_path / "m.pt2")
    for options, expected in (
        ([], {"RotaryEmbedding": 1}),
        (["--accept", name], BOTH),
        (["--budget", "1e-9"], {}),
    ):
        path = tmp_path / "r.json"
        assert main(["inspect", source, *options, "--report", str(path)]) == 0
        assert json.loads(path.read_text())["counts"] == expected
    printed = capsys.readouterr().out
    assert f"accepted {name}: " in printed.replace("\n", " ") and "its time was over" in printed.replace("\n", " ")
    assert main(["export", source, "--accept", name, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["counts"] == BOTH
    for wrong in (["--budget", "0"], ["--accept", "clamp@model.py"]):
        assert main(["inspect", source, *wrong]) == 2
        assert wrong[0].strip("-") in capsys.readouterr().err


def test_transformers_take_them() -> None:
    pytest.importorskip("transformers.exporters")
    from fxfuse.integrations.transformers import FxfuseConfig

    assert FxfuseConfig(accept=["clamp@model.py:3"], budget=5.0).budget == 5.0
    for wrong in ({"accept": "clamp@model.py:3"}, {"budget": 0}):
        with pytest.raises(FxfuseError, match=f"where: {next(iter(wrong))}"):
            FxfuseConfig(**wrong)


def test_decoders_refuse_what_is_none_before_they_load() -> None:
    from fxfuse.decoder.export import export_decoder

    with pytest.raises(FxfuseError, match="where: accept"):
        export_decoder(None, accept=[3])  # type: ignore[list-item]
    with pytest.raises(FxfuseError, match="where: budget"):
        export_decoder(None, budget=-1)


def test_what_a_door_hands_on() -> None:
    assert Options().arguments["frozen"] is False and Options().for_export(24)["frozen"] is True
    assert Options(frozen=False).for_export(24)["frozen"] is False and Options(frozen=True).arguments["frozen"] is True
    assert Options(accept=["a@b.py:1"], budget=3).for_export(23)["accept"] == ("a@b.py:1",)
