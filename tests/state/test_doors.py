"""What a model writes in place, at every door: right over consecutive calls, or refused by name; dropped at none."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from operator import attrgetter
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import fxfuse.onnx
from fxfuse.cli import main
from fxfuse.errors import FxfuseError
from fxfuse.report.record import schema
from fxfuse.state import lift
from tests.state.test_lift import Cache

Write = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


def nested(context: Any, write: Write) -> Write:
    def within(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with context():
            return write(m, x, y)

    return within


def add(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    m.state.add_(x)
    return m.state  # type: ignore[no-any-return]


def count(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    m.count += 1
    return m.count  # type: ignore[no-any-return]


def copy_into_a_slice(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    m.scratch[:, 1:3].copy_(x[:, 1:3] + m.scratch[:, :2])
    return m.scratch  # type: ignore[no-any-return]


def put_into_a_constant(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    m.plain.index_put_((torch.tensor([1]),), x[:1] + m.plain[0])
    return m.plain  # type: ignore[no-any-return]


def scatter(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    m.state.scatter_(1, torch.tensor([[1], [2]]), x[:, :1] + m.state[:, :1])
    return m.state  # type: ignore[no-any-return]


def masked_fill(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    m.state.masked_fill_(x > 0.5, 7.0)
    return m.state  # type: ignore[no-any-return]


def parameter(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        m.weight.mul_(0.5)
    return m.weight * x  # type: ignore[no-any-return]


def the_input(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    y[torch.tensor([1])] = x[:1]
    return y * 2


def a_view_of_the_input(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    y.t()[1:2].mul_(3.0)
    return y * 2


KINDS: dict[str, tuple[str, Write]] = {
    "add_": ("state", add),
    "counter": ("count", count),
    "copy_ into a slice": ("scratch", copy_into_a_slice),
    "index_put_ into a constant": ("plain", put_into_a_constant),
    "scatter_": ("state", scatter),
    "masked_fill_": ("state", masked_fill),
    "under no_grad": ("state", nested(torch.no_grad, add)),
    "under autocast": ("state", nested(lambda: torch.autocast("cpu", torch.bfloat16), add)),
    "parameter": ("weight", parameter),
    "input": ("y", the_input),
    "view of an input": ("y", a_view_of_the_input),
    "input under no_grad": ("y", nested(torch.no_grad, the_input)),
}
FEW = ("counter", "under no_grad", "input")
EXPORTED = (*FEW, "copy_ into a slice", "index_put_ into a constant", "parameter", "view of an input")


def sampled(few: tuple[str, ...]) -> list[Any]:
    return [kind if kind in few else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


class Model(nn.Module):
    """A layer beside a write; every kind of tensor to write to."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.write = KINDS[kind][1]
        self.register_buffer("state", torch.rand(2, 4))
        self.register_buffer("scratch", torch.rand(2, 4), persistent=False)
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))
        self.plain = torch.rand(2, 4)
        self.weight = nn.Parameter(torch.rand(2, 4))
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.write(self, x, y)  # type: ignore[no-any-return]


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(2, 4), torch.rand(2, 4)


def build(kind: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Model(kind).eval(), inputs()


def follow(path: Path, kind: str, calls: int = 3) -> None:
    """Call after call in ONNX Runtime, as eager PyTorch does it."""
    model = Model(kind).eval()
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    metadata = {p.key: p.value for p in onnx.load(path, load_external_data=False).metadata_props}
    aliases: dict[str, str] = json.loads(metadata["fxfuse.state"])["aliases"]
    assert aliases == {f"present.{KINDS[kind][0]}": KINDS[kind][0]}
    names = [output.name for output in session.get_outputs()]
    state = {n: attrgetter(n)(model).detach().numpy().copy() for n in aliases.values() if n != "y"}
    for _ in range(calls):
        x, y = inputs()
        feeds = {"x": x.numpy(), "y": y.numpy().copy(), **state}
        wanted = {i.name for i in session.get_inputs()}
        results = dict(zip(names, session.run(names, {n: v for n, v in feeds.items() if n in wanted}), strict=True))
        with torch.no_grad():
            np.testing.assert_allclose(results[names[0]], model(x, y), rtol=1e-5, atol=1e-5)
        for present, past in aliases.items():
            after = y if past == "y" else attrgetter(past)(model).detach()
            np.testing.assert_allclose(results[present], after, rtol=1e-5, atol=1e-5)
        state = {past: results[present] for present, past in aliases.items() if past != "y"}


@pytest.mark.parametrize("kind", sampled(EXPORTED))
def test_exported_it_follows_eager(kind: str, tmp_path: Path) -> None:
    fxfuse.onnx.export(*build(kind), f=tmp_path / "model.onnx")
    follow(tmp_path / "model.onnx", kind)


@pytest.mark.parametrize("kind", sampled((*FEW, "parameter", "under autocast")))
def test_the_plugin_names_what_it_would_drop(kind: str) -> None:
    model, args = build(kind)
    with fxfuse.onnx.enabled(), pytest.raises(Exception, match="would drop that") as caught:
        torch.onnx.export(model, args, dynamo=True, opset_version=24, verbose=False)
    error = next(e for e in (caught.value, caught.value.__cause__) if isinstance(e, FxfuseError))
    assert f"'{KINDS[kind][0]}'" in error.what and "test_doors.py" in str(error.where)


@pytest.mark.parametrize("kind", sampled(FEW[:2]))
def test_the_command_line_lifts_and_says_so(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, (name, _) = tmp_path / "out", KINDS[kind]
    code = main(["export", f"{__name__}:build", "--set", f"kind={kind!r}", "--out", str(out)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    (state,) = json.loads((out / "report.json").read_text())["states"]
    assert (state["input"], state["output"], state["target"]) == (name, f"present.{name}", name)
    assert "test_doors.py" in state["source"] and f"present.{name}" in printed.out
    assert state["initial"] == (0 if kind == "counter" else None)
    follow(out / "model.onnx", kind)


def build_cache() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Cache("index_copy_").eval(), (torch.randn(1, 2, 16), torch.tensor([0, 1]))


def test_the_command_line_names_caches_by_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.json"
    code = main(["export", f"{__name__}:build_cache", "--out", str(tmp_path / "out"), "--report", str(page)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    record = json.loads(page.read_text())
    jsonschema.validate(record, schema())
    names = {state["input"]: (state["output"], state["target"], state["initial"]) for state in record["states"]}
    assert names == {
        "past_key_values.0.key": ("present.0.key", "k", 0),
        "past_key_values.0.value": ("present.0.value", "v", 0),
    }
    assert record["parity"] and all(check["result"]["passed"] for check in record["parity"])
    assert "k is state: input past_key_values.0.key" in printed.out


@pytest.mark.parametrize("kind", FEW)
def test_without_the_plugin_a_lifted_program_is_whole(kind: str, tmp_path: Path) -> None:
    """torch.onnx.export drops what is written in place, whoever fused it: it is lifted first."""
    model, args = build(kind)
    lifted = lift(torch.export.export(model, args))
    onnx_program = torch.onnx.export(
        fxfuse.fuse(lifted.program),
        dynamo=True,
        opset_version=24,
        custom_translation_table=fxfuse.onnx.translation_table(24),
        verbose=False,
    )
    assert onnx_program is not None
    assert len(onnx_program.model.graph.outputs) == 2
    state = {f"{s.placeholder}": s.initial for s in lifted.states if s.initial is not None}
    results = onnx_program(*inputs(), **state)
    assert len(results) == 2


class Returned(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y.add_(x)
        return y


def test_an_input_that_is_written_to_and_returned_is_not_dropped() -> None:
    with fxfuse.onnx.enabled():
        onnx_program = torch.onnx.export(Returned().eval(), inputs(), dynamo=True, opset_version=24, verbose=False)
    assert onnx_program is not None
    x, y = inputs()
    torch.testing.assert_close(onnx_program(x, y)[0], x + y)


class Data(nn.Module):
    """Written through `.data`, of which a capture knows nothing; or grown, which no buffer of a graph can be."""

    def __init__(self, grows: bool) -> None:
        super().__init__()
        self.grows = grows
        self.register_buffer("state", torch.zeros(2, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.grows:
            self.state = torch.cat([self.state, x])
        else:
            self.state.data[:, 1:] = x[:, 1:]
        return self.state.sum(0) + x


@pytest.mark.parametrize("grows", [True, False])
@pytest.mark.parametrize("plugin", [True, False])
def test_what_no_graph_can_hold_is_refused(grows: bool, plugin: bool) -> None:
    with fxfuse.onnx.enabled() if plugin else nullcontext(), pytest.raises(Exception, match="in place") as caught:
        export: Any = torch.onnx.export if plugin else fxfuse.onnx.export
        export(Data(grows).eval(), (torch.rand(2, 4),), dynamo=True, opset_version=24, verbose=False)
    error = next(e for e in (caught.value, caught.value.__cause__) if isinstance(e, FxfuseError))
    assert "test_doors.py" in str(error.where)
