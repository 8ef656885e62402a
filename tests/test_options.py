"""Options at every door: `frozen`, `accept` and `budget`, and what single patterns declare."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

import fxfuse
import fxfuse.onnx
from fxfuse.cli import main
from fxfuse.errors import FxfuseError
from fxfuse.options import Options
from fxfuse.patterns.flex_attention import PATTERN as FLEX_ATTENTION
from fxfuse.patterns.flex_attention import FlexAttention
from fxfuse.patterns.rms_norm import PATTERN as RMS_NORM
from fxfuse.patterns.rotary_embedding import PATTERN as ROTARY_EMBEDDING
from fxfuse.recognise.answers import Found
from fxfuse.recognise.catalogue import register, unregister
from fxfuse.recognise.declared import check_declared, option

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
    assert Options().frozen is None and Options().for_export(24).frozen is True
    assert Options(frozen=False).for_export(24).frozen is False
    assert Options(accept=["a@b.py:1"], budget=3).for_export(23) == Options(
        23, frozen=True, accept=["a@b.py:1"], budget=3
    )
    assert Options(23).for_export(24).opset == 23 and Options(25).for_export(24).opset == 24


def test_what_is_said_anew_and_what_stays() -> None:
    marked = Options.given(opset=25, windows="attributes", budget=3.0)
    options = marked.but(flex_attention="preview", budget=5.0, accept=None)
    assert options.of_patterns == {"windows": "attributes", "flex_attention": "preview"}
    assert options.budget == 5.0 and options.accept == () and options.opset == 25


def test_options_become_the_patterns_own() -> None:
    given = Options.given(windows="attributes", block_mask="reconstruct").chosen(25)
    assert FlexAttention(windows="attributes", block_mask="reconstruct") in given and FLEX_ATTENTION not in given
    mine = FlexAttention(calls="preview")
    assert Options(patterns=[mine]).chosen(24) == [mine], "what the pattern says itself stays"
    assert Options(patterns=[mine]).but(flex_attention="standard").chosen(24) == [FLEX_ATTENTION], "a keyword wins"
    assert Options(patterns=[RMS_NORM]).but(windows="mask").chosen(24) == [RMS_NORM]
    for wrong in ({"windows": "yes"}, {"windoes": "mask"}):
        with pytest.raises(FxfuseError, match=f"where: {next(iter(wrong))}"):
            Options.given(**wrong)
    with pytest.raises(FxfuseError, match="from opset 25 on"):
        Options(24, patterns=[FlexAttention(windows="attributes")])
    with pytest.raises(FxfuseError, match="unknown flex_attention='some'"):
        FlexAttention(calls="some")


def test_prove_is_the_word_and_verify_its_older_name(program: ExportedProgram) -> None:
    for options in ({"prove": "off"}, {"verify": "off"}):
        (entry,) = fxfuse.report(fxfuse.fuse(program, frozen=True, **options)).fused("RotaryEmbedding")
        assert entry.evidence is None
        assert Options.given(**options).prove == "off"
    (entry,) = fxfuse.report(fxfuse.fuse(program, frozen=True)).fused("RotaryEmbedding")
    assert entry.evidence is not None
    with pytest.raises(FxfuseError, match="differ"):
        Options.given(prove="on", verify="off")


@dataclass(frozen=True)
class Norms:
    """A pattern of somebody's own, with an option: norms that it takes before the shipped pattern does."""

    name = "norms_on_request"
    operator = "RMSNormalization"
    since_opset = 23
    my_norms: Literal["left", "taken"] = option(
        Literal["left", "taken"], help="what becomes of norms: 100% of them are taken, or none"
    )

    def __post_init__(self) -> None:
        check_declared(self)

    def propose(self, view: Any, ask: Any) -> Iterator[Any]:
        if self.my_norms == "taken":
            yield from RMS_NORM.propose(view, ask)

    def recognise(self, region: Any, ask: Any) -> Any:
        answer = RMS_NORM.recognise(region, ask)
        return replace(answer, parameters={"taken": "on request"}) if isinstance(answer, Found) else answer


@pytest.fixture
def norms() -> Iterator[None]:
    register(Norms())
    yield
    unregister("norms_on_request")


class Norm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def taken(fused: Any) -> bool:
    (entry,) = fxfuse.report(fused).fused("RMSNormalization")
    return entry.parameters == {"taken": "on request"}


def test_an_option_of_a_pattern_of_ones_own_is_there_at_every_door(
    norms: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, args, keyword = Norm().eval(), (X,), {"my_norms": "taken"}
    program = torch.export.export(model, args)
    assert not taken(fxfuse.fuse(program)) and taken(fxfuse.fuse(program, **keyword))
    assert taken(fxfuse.prepass(torch.export.export, **keyword)(model, args))
    assert taken(fxfuse.onnx.export(program, **keyword))
    assert taken(fxfuse.onnx.export(fxfuse.prepass(Norm().eval(), **keyword), args))
    with fxfuse.onnx.enabled(**keyword):
        assert taken(torch.onnx.export(model, args, dynamo=True, opset_version=24, verbose=False))
    fxfuse.onnx.install(**keyword)
    try:
        assert taken(torch.onnx.export(model, args, dynamo=True, opset_version=24, verbose=False))
    finally:
        fxfuse.onnx.uninstall()
    fxfuse.verify(program, fxfuse.fuse(program, **keyword), **keyword)
    torch.export.save(program, tmp_path / "m.pt2")
    report = tmp_path / "r.json"
    assert main(["inspect", str(tmp_path / "m.pt2"), "--my-norms", "taken", "--report", str(report)]) == 0
    entries = json.loads(report.read_text())["report"]["entries"]
    assert [e["parameters"] for e in entries if e["status"] == "fused"] == [{"taken": "on request"}]
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "what becomes of norms: 100% of them are taken" in " ".join(capsys.readouterr().out.split())
    for door in (fxfuse.prepass, fxfuse.onnx.install, lambda **wrong: fxfuse.fuse(program, **wrong)):
        with pytest.raises(FxfuseError, match="where: my_norms"):
            door(my_norms="some")


def test_a_pattern_that_fails_while_it_makes_a_program_ready_is_left_out(program: ExportedProgram) -> None:
    class Failing(Norms):
        def prepare(self, program: ExportedProgram, ask: Any) -> None:
            program.graph.erase_node(next(n for n in reversed(program.graph.nodes) if n.op == "output"))
            raise ZeroDivisionError("halfway")

    report = fxfuse.report(fxfuse.fuse(program, patterns=[Failing(), ROTARY_EMBEDDING], frozen=True))
    assert report.counts == {"RotaryEmbedding": 1}
    (entry,) = report.refused()
    assert "failed while it made the program ready" in str(entry.reason) and "halfway" in str(entry.reason)


def test_a_pattern_says_how_it_needs_programs_to_be_captured(norms: None) -> None:
    within: list[str] = []

    @dataclass(frozen=True)
    class Wishful(Norms):
        name = "wishful"

        @contextmanager
        def capturing(self) -> Iterator[None]:
            within.append("captured")
            yield
            within.append("left")

    class Failing(Norms):
        name = "failing"

        def capturing(self) -> Any:
            raise ZeroDivisionError("before it began")

    register(Wishful())
    try:
        fxfuse.prepass(torch.export.export)(Norm().eval(), (X,))
        assert within == ["captured", "left"]
        assert counts(fxfuse.onnx.export(Norm().eval(), (X,))) == {"RMSNormalization": 1}
        assert within == ["captured", "left"] * 2
        register(Failing())
        with pytest.warns(fxfuse.FxfuseWarning, match="ZeroDivisionError: before it began"):
            fxfuse.prepass(torch.export.export)(Norm().eval(), (X,))
    finally:
        unregister("wishful")
        unregister("failing")
