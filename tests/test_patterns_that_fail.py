"""Whatever a pattern does, fusing goes on without it, and the report says which one failed, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, ExportedProgram

import fxfuse
from fxfuse.errors import FxfuseWarning
from fxfuse.patterns.rms_norm import PATTERN as RMS_NORM
from fxfuse.recognise import catalogue as catalogues
from fxfuse.recognise.answers import Found, Proposal, Reason
from fxfuse.recognise.by_example import Example
from fxfuse.recognise.catalogue import catalogue, register, unregister
from fxfuse.report.model import Report


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16, eps=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) * torch.sigmoid(x)


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    return exported(Model(), torch.randn(2, 5, 16))


def exported(module: nn.Module, x: torch.Tensor) -> ExportedProgram:
    return torch.export.export(module.eval(), (x,), dynamic_shapes=({0: Dim.AUTO},))


def fused(program: ExportedProgram, *patterns: Any, **options: Any) -> Report:
    """The report; the program is the model still."""
    result = fxfuse.fuse(program, patterns=[*patterns, RMS_NORM], **options)
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(result.module()(x), program.module()(x))
    return fxfuse.report(result)


class Failing:
    """A pattern for every node, that does what it is told to."""

    name, operator, since_opset = "failing", "Failing", 23

    def __init__(self, **does: Callable[..., Any]) -> None:
        self.does = does

    def propose(self, view: Any, ask: Any) -> Any:
        if "propose" in self.does:
            return self.does["propose"](view)
        return ours(view)

    def recognise(self, region: Any, ask: Any) -> Any:
        return self.does["recognise"]() if "recognise" in self.does else found(self.does["form"])


def found(form: Any) -> Found:
    return Found("Failing", {}, (form,))


def ours(view: Any) -> Iterator[Proposal]:
    from fxfuse.graph.region import between

    node = next(n for n in view.nodes if "sigmoid" in n.name)
    region = between(view, node, list(node.all_input_nodes), lambda _: True)
    yield Proposal(node, iter([region]))


def boom(*_: Any) -> Any:
    raise KeyError("boom")


def late(view: Any) -> Iterator[Proposal]:
    yield from ours(view)
    boom()


@pytest.mark.parametrize(
    "does, said",
    [
        ({"propose": boom}, "could not propose: KeyError"),
        ({"propose": late, "recognise": lambda: Reason("no")}, "could not propose: KeyError"),
        ({"propose": lambda view: None}, "could not propose: TypeError"),
        ({"propose": lambda view: iter([3])}, "failed: AttributeError"),
        ({"propose": lambda view: iter([Proposal(view.nodes[0], iter([3]))])}, "failed: "),
        ({"propose": lambda view: iter([Proposal(view.nodes[0], 3)])}, "could not propose: TypeError"),
        ({"recognise": boom}, "could not be asked: KeyError"),
        ({"recognise": lambda: None}, "could not be asked: TypeError: it answered None"),
        ({"form": boom}, "KeyError"),
        ({"form": lambda x: 3}, "gives int"),
        ({"form": lambda x: None}, "gives NoneType"),
        ({"form": lambda x: (x, x)}, "gives 2 values"),
    ],
)
def test_the_report_says_how_it_failed(program: ExportedProgram, does: dict[str, Any], said: str) -> None:
    report = fused(program, Failing(**does))
    assert report.counts == {"RMSNormalization": 1}
    (entry,) = [e for e in report if e.operator == "Failing"]
    assert entry.status != "fused" and said in str(entry.reason)
    if "KeyError" in said:
        assert "boom" in str(entry.reason)
    if ": " in said:
        assert "the pattern failing " in str(entry.reason)


@pytest.mark.parametrize("form", [boom, lambda x: 3, lambda x: None, lambda x: (x, x), lambda x: [x, 3]])
def test_a_replacement_that_was_not_proven_does_not_break_the_graph(program: ExportedProgram, form: Any) -> None:
    report = fused(program, Failing(form=form), prove="off")
    assert report.counts == {"RMSNormalization": 1}
    (entry,) = [e for e in report if e.operator == "Failing"]
    assert entry.status == "refused" and entry.reason


def test_parameters_that_are_none_do_not_break_the_graph(program: ExportedProgram) -> None:
    from fxfuse.recognise.answers import Input

    bad = Failing(recognise=lambda: Found("Failing", {"x": Input(7)}, (torch.sigmoid,)))
    report = fused(program, bad)
    assert report.counts == {"RMSNormalization": 1}
    (entry,) = report.refused("Failing")
    assert "the pattern failing failed while the graph was rewritten: IndexError" in str(entry.reason)


def test_an_example_that_raises_says_so(program: ExportedProgram) -> None:
    def wrong(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x.no_such_method() * w

    report = fused(program, Example(wrong, torch.mul, None, 4.0))
    (entry,) = report.near_misses("wrong")
    assert "the example raised AttributeError: " in str(entry.reason) and "no_such_method" in str(entry.reason)
    assert "test_patterns_that_fail.py:" in str(entry.reason), "where it was raised"
    assert report.counts == {"RMSNormalization": 1}


# ---- values that are lists


def swiglu(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return F.silu(a) * b


def gated(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.silu(a) * b


def best(x: torch.Tensor) -> torch.Tensor:
    return x.topk(2, -1)[0].sum(-1)


def ordered(x: torch.Tensor) -> torch.Tensor:
    return x.sort(-1)[0] * 2


def together(x: torch.Tensor) -> torch.Tensor:
    a, b, c = x.unbind(1)
    return a * b + c


def turned(x: torch.Tensor) -> torch.Tensor:
    a, b = x.split([4, 12], -1)
    return torch.cat([b, a], -1) * x


EXAMPLES = [swiglu, gated, best, ordered, together, turned]


@pytest.mark.parametrize("function", EXAMPLES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("model", EXAMPLES, ids=lambda f: f.__name__)
def test_lists_of_values(model: Any, function: Any) -> None:
    class Lists(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
            result: torch.Tensor = gated(*x.tensor_split(2, -1)) if model is gated else model(x)
            return result

    captured = exported(Lists(), torch.randn(2, 3, 16))
    result = fxfuse.fuse(captured, patterns=[Example(function, function, None, 4.0)])
    x = torch.randn(5, 3, 16)
    torch.testing.assert_close(result.module()(x), captured.module()(x))
    assert not any("Assertion" in str(e.reason) for e in fxfuse.report(result))
    if model is function and function not in (best, ordered):  # which are not put together of pieces that can be met
        assert fxfuse.report(result).counts == {function.__name__: 1}


# ---- the catalogue


def test_entry_points_that_cannot_be_loaded_are_left_out(
    program: ExportedProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [
        EntryPoint("absent", "no.such.module:PATTERN", catalogues.GROUP),
        EntryPoint("other", "json:dumps", catalogues.GROUP),
        EntryPoint("kind", "fxfuse.patterns.rms_norm:RMSNorm", catalogues.GROUP),
        EntryPoint("right", "fxfuse.patterns.rms_norm:PATTERN", catalogues.GROUP),
    ]
    monkeypatch.setattr(catalogues, "entry_points", lambda group: points)
    with pytest.warns(FxfuseWarning) as caught:
        report = fxfuse.report(fxfuse.fuse(program))
    said = [str(w.message) for w in caught if w.category is FxfuseWarning]
    assert len(said) == 3
    for name, what in (("absent", "ModuleNotFoundError"), ("other", "is not a pattern"), ("kind", "is not a pattern")):
        assert any(f"entry point {name} " in s and what in s for s in said)
    assert report.counts == {"RMSNormalization": 1}


def test_of_one_name_both_are_tried() -> None:
    def make(factor: float) -> Any:
        def scaled(x: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(x) * factor

        scaled.__qualname__ = f"scaled_by_{factor}"
        return Example(scaled, scaled, f"Scaled{factor:g}", 4.0)

    class Both(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (torch.sigmoid(x) * 2).exp() + torch.sigmoid(x + 1) * 3

    try:
        for factor in (2.0, 3.0, 2.0):  # the first once more, as a cell that is run again
            register(make(factor))
        assert [p.operator for p in catalogue() if p.name == "scaled"] == ["Scaled3", "Scaled2"]
        report = fxfuse.report(fxfuse.fuse(exported(Both(), torch.randn(2, 3, 16))))
        assert report.counts == {"Scaled2": 1, "Scaled3": 1}
    finally:
        unregister("scaled")
    assert not [p for p in catalogue() if p.name == "scaled"]


# ---- the time


def test_when_the_time_is_over_it_ends() -> None:
    model = nn.Sequential(*(Model() for _ in range(4)))
    captured = exported(model, torch.randn(2, 5, 16))
    result = fxfuse.fuse(captured, budget=1e-9)
    report = fxfuse.report(result)
    (entry,) = report
    assert entry.status == "near miss" and "its time was over" in str(entry.reason) and report.counts == {}
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(result.module()(x), model(x))


def test_what_was_found_by_then_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(Model() for _ in range(4)))
    captured = exported(model, torch.randn(2, 5, 16))
    asked: list[int] = []

    class Slow:
        """Takes longer with every region."""

        name, operator, since_opset = RMS_NORM.name, RMS_NORM.operator, 23

        def propose(self, view: Any, ask: Any) -> Any:
            for proposal in RMS_NORM.propose(view, ask):
                asked.append(1)
                if len(asked) == 3:
                    ask._until = 0.0
                yield proposal

        def recognise(self, region: Any, ask: Any) -> Any:
            return RMS_NORM.recognise(region, ask)

    result = fxfuse.fuse(captured, patterns=[Slow(), RMS_NORM])
    assert fxfuse.report(result).counts == {"RMSNormalization": 2} and len(asked) == 3
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(result.module()(x), model(x))
