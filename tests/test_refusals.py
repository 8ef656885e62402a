"""Refusals have names, and say what overrules them: a bound or fill that is accepted, a buffer that stays as it is."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

import fxfuse
from fxfuse.errors import FxfuseError, FxfuseWarning
from fxfuse.report.model import Entry, Report

FREE = {0: Dim.AUTO, 2: Dim.AUTO}


class Scores(nn.Module):
    """Attention whose scores are changed on the way."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.change(q @ k.transpose(-1, -2) / 4), -1) @ v

    def change(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.clamp(-5e4, 5e4)


class Tight(Scores):
    def change(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.clamp(max=3.0)


class Folded(Scores):
    def change(self, scores: torch.Tensor) -> torch.Tensor:
        return torch.where(scores > 5e3, -scores, scores)


class Filled(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = (q @ k.transpose(-1, -2) / 4).masked_fill(mask, -1e4)
        return torch.softmax(scores, -1) @ v


class Bounded(nn.Module):
    """A norm that bounds what it squares."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        root = torch.rsqrt(x.clamp(-1e5, 1e5).pow(2).mean(-1, keepdim=True) + 1e-5)
        return x * root * self.weight


class Rotated(nn.Module):
    """A rotation by a table of signs, which load_state_dict may change."""

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("sign", torch.tensor([-1.0] * 8 + [1.0] * 8), persistent=persistent)

    def forward(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        e = torch.cat([angles, angles], -1)[:, None]
        return x * e.cos() + torch.cat([x[..., 8:], x[..., :8]], -1) * self.sign * e.sin()


class Lower(nn.Module):
    """Causal by a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("lower", torch.ones(64, 64, dtype=torch.bool).tril())

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n = q.shape[2]
        scores = (q @ k.transpose(-1, -2) / 4).masked_fill(~self.lower[:n, :n], float("-inf"))
        return torch.softmax(scores, -1) @ v


def attention(module: nn.Module, *masks: torch.Tensor) -> ExportedProgram:
    qkv = tuple(torch.randn(2, 4, 7, 16) for _ in range(3))
    more = tuple({2: Dim.AUTO, 3: Dim.AUTO} for _ in masks)
    return torch.export.export(module.eval(), (*qkv, *masks), dynamic_shapes=(FREE, FREE, FREE, *more))


def norm(module: nn.Module) -> ExportedProgram:
    axes = {0: Dim.AUTO, 1: Dim.AUTO}
    return torch.export.export(module.eval(), (torch.randn(2, 5, 16),), dynamic_shapes=(axes,))


def rotation(module: nn.Module) -> ExportedProgram:
    inputs = (torch.randn(2, 5, 4, 16), torch.randn(5, 8))
    return torch.export.export(module.eval(), inputs, dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO}))


def reported(program: ExportedProgram, **options: Any) -> Report:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FxfuseWarning)
        return fxfuse.report(fxfuse.fuse(program, **options))


def only(report: Report) -> Entry:
    (entry,) = report
    return entry


@pytest.mark.parametrize(
    "program, what, differs",
    [
        (lambda: attention(Scores()), "clamp", "below -50000 or above 50000"),
        (lambda: attention(Tight()), "clamp", "is above 3,"),
        (lambda: norm(Bounded()), "clamp", "below -100000 or above 100000"),
        (lambda: attention(Filled(), torch.rand(1, 1, 7, 7) > 0.5), "masked_fill", "-10000 hides keys"),
    ],
    ids=["scores", "tight", "norm", "fill"],
)
def test_a_refusal_is_overruled_by_its_name(program: Any, what: str, differs: str) -> None:
    captured = program()
    before = only(reported(captured))
    assert before.status != "fused" and before.name is not None and before.evidence is None
    assert re.fullmatch(rf"{what}@test_refusals\.py:\d+", before.name)
    assert before.reason is not None and f"accept=['{before.name}']" in before.reason
    assert only(reported(program())).name == before.name, "the same in every run"

    after = only(reported(captured, accept=[before.name]))
    assert after.status == "fused" and after.evidence is not None and after.name is None
    assert after.evidence.accepted == (before.name,)
    (said,) = [d for d in after.evidence.differences if before.name in d]
    assert differs in said


def test_a_fill_that_is_accepted_is_a_mask() -> None:
    program = attention(Filled(), torch.rand(1, 1, 7, 7) > 0.5)
    fused = fxfuse.fuse(program, accept=[str(only(reported(program)).name)])
    assert only(fxfuse.report(fused)).parameters["attn_mask"] == ["mask"]
    q, k, v, mask = *(torch.randn(3, 4, 9, 16) for _ in range(3)), torch.rand(1, 1, 9, 9) > 0.5
    mask[..., 2, :] = True  # a row that sees no key
    torch.testing.assert_close(fused.module()(q, k, v, mask), Filled()(q, k, v, mask), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_overruled_says_so() -> None:
    entry = only(reported(attention(Folded())))
    assert entry.status == "refused" and entry.name is not None and "accept=" not in str(entry.reason)
    again = only(reported(attention(Folded()), accept=[entry.name]))
    assert again.status == "refused" and again.name == entry.name
    assert f"accepting {entry.name} does not overrule this: " in str(again.reason)


def test_a_name_of_no_single_call_is_the_operators() -> None:
    entry = only(reported(rotation(Rotated())))
    assert re.fullmatch(r"rotaryembedding@test_refusals\.py:\d+", str(entry.name))
    again = only(reported(rotation(Rotated()), accept=[str(entry.name)]))
    assert again.status != "fused" and "does not overrule" in str(again.reason)


def test_names_that_change_nothing_are_warned_of() -> None:
    program = attention(Scores())
    name = str(only(reported(program)).name)
    with pytest.warns(FxfuseWarning, match=r"'clamp@other\.py:1' changed nothing: nothing in this program"):
        fxfuse.fuse(program, accept=["clamp@other.py:1"])
    with pytest.warns(FxfuseWarning, match=f"the report has {re.escape(name)}"):
        fxfuse.fuse(program, accept=[name + "0"])
    line = name.partition("@")[2]
    with pytest.warns(FxfuseWarning, match="nothing was refused by it"):
        fxfuse.fuse(norm(nn.Sequential(nn.RMSNorm(16, eps=1e-5), Clamped())), accept=[Clamped.name])
    assert line


class Clamped(nn.Module):
    name = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-1, 1)


Clamped.name = f"clamp@test_refusals.py:{Clamped.forward.__code__.co_firstlineno + 1}"


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_that_may_change_is_named(persistent: bool) -> None:
    program = rotation(Rotated(persistent))
    assert reported(program, frozen=True).counts == {"RotaryEmbedding": 1}
    entry = only(reported(program))
    if persistent:
        assert entry.status == "near miss"
        assert "persistent buffer 'sign'" in str(entry.reason) and "frozen=True" in str(entry.reason)
    else:
        assert entry.status == "fused"


def test_a_mask_that_is_kept_for_a_buffer_says_so() -> None:
    program = attention(Lower())
    kept, frozen = only(reported(program)), only(reported(program, frozen=True))
    assert kept.parameters["is_causal"] == 0 and frozen.parameters["is_causal"] == 1
    assert kept.evidence is not None and frozen.evidence is not None
    assert "persistent buffer 'lower'" in " ".join(kept.evidence.claims)
    assert "persistent" not in " ".join(frozen.evidence.claims)


@pytest.mark.parametrize(
    "options",
    [
        {"accept": "clamp@model.py:12"},
        {"accept": 3},
        {"accept": [""]},
        {"accept": [None]},
        {"accept": ["clamp@model.py"]},
        {"budget": 0},
        {"budget": -1.0},
        {"budget": float("nan")},
        {"budget": "long"},
        {"budget": True},
        {"frozen": "yes"},
        {"patterns": ["rms_norm"]},
        {"patterns": 3},
    ],
    ids=str,
)
def test_options_that_are_none(options: dict[str, Any]) -> None:
    with pytest.raises(FxfuseError, match=f"where: {next(iter(options))}"):
        fxfuse.fuse(norm(Bounded()), **options)
    with pytest.raises(FxfuseError, match=f"where: {next(iter(options))}"):
        fxfuse.prepass(**options)
