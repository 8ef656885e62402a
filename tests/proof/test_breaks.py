"""Breaks: which of their pieces ran, for each slice of their bound; what cannot run; what fills; what overflows."""

from __future__ import annotations

import math

import pytest
import torch

from fxfuse.proof.breaks import Breaks, coarse_casts, masks
from fxfuse.proof.reach import FINITE, unreachable
from tests.proof.regions import broken, evaluate, export

X = torch.tensor([[-2.0, -0.5, 0.5, 2.0]] * 3)
SMALL = X / 100

PIECES = {
    "clamp": (lambda x: x.clamp(-1, 1), ["below", "above"]),
    "clamp from above": (lambda x: x.clamp(max=1), ["above"]),
    "relu6": (lambda x: torch.nn.functional.relu6(x * 4), ["above"]),
    "hardtanh": (lambda x: torch.nn.functional.hardtanh(x), ["below", "above"]),
    "where": (lambda x: torch.where(x.abs() > 1, x, x * 2), ["true"]),
    "masked_fill": (lambda x: x.masked_fill(x > 1, 0.0), ["true"]),
    "threshold": (lambda x: torch.nn.functional.threshold(x, 1.0, 0.0), ["above"]),
    "larger of two": (lambda x: torch.maximum(x, torch.ones_like(x)), ["the first"]),
    "rounded down": (lambda x: x.floor(), ["beyond one"]),
    "softplus": (lambda x: torch.nn.functional.softplus(x, 1.0, 1.0), ["straight"]),
}


@pytest.mark.parametrize("case", PIECES)
def test_a_piece_that_did_not_run_is_missing(case: str) -> None:
    function, missing = PIECES[case]
    program = export(function, X)
    breaks = Breaks()
    evaluate(program, SMALL, breaks=breaks)
    assert {piece for _, piece in breaks.missing} == set(missing)
    evaluate(program, X, breaks=breaks)
    assert not list(breaks.missing)


ANALYTIC = {
    "a sum of products": lambda x: (x * x + x).sum(-1),
    "softmax": lambda x: x.softmax(-1),
    "a root": lambda x: (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * x,
    "soft cap": lambda x: 5 * torch.tanh(x / 5),
    "moved": lambda x: torch.cat([-x[..., 2:], x[..., :2]], -1).transpose(0, 1),
}


@pytest.mark.parametrize("case", ANALYTIC)
def test_what_is_analytic_has_no_pieces(case: str) -> None:
    breaks = Breaks()
    evaluate(export(ANALYTIC[case], X), X, breaks=breaks)
    assert not breaks.found


def test_a_bound_for_each_feature_has_to_be_met_in_each() -> None:
    """Three features bounded by 1 say nothing of the fourth, which is bounded by 1e30."""
    bounds = torch.tensor([1.0, 1.0, 1.0, 1e30])
    large = torch.full((3, 4), 5.0)
    found = broken(torch.minimum, (-large, bounds), (large, bounds))
    assert found.missing == ["the first"]
    assert not broken(torch.minimum, (-large, bounds), (large, bounds), (large * 1e30, bounds)).missing


def test_a_bound_for_each_head_has_to_be_met_in_each() -> None:
    bounds = torch.tensor([1.0, 100.0]).view(1, 2, 1, 1)
    scores = torch.full((3, 2, 4, 4), 5.0)
    assert broken(torch.minimum, (-scores, bounds), (scores, bounds)).missing == ["the first"]
    assert not broken(torch.minimum, (-scores, bounds), (scores, bounds), (scores * 100, bounds)).missing


def test_a_bound_at_the_end_of_the_type_cannot_be_met() -> None:
    found = broken(lambda x: x.clamp(min=torch.finfo(torch.float32).min), (X,))
    assert not found.missing and "float32" in found.beyond["below"]
    wide = broken(lambda x: x.clamp(min=torch.finfo(torch.float16).min), (X,))
    assert wide.missing == ["below"]


def test_what_is_finite_is_not_infinite() -> None:
    found = broken(lambda x: x.isinf(), (X,))
    assert found.missing == ["true"] and unreachable(found, "true") == FINITE
    found = broken(lambda x: x > 5, (X,))
    assert found.missing == ["true"] and unreachable(found, "true") is None


@pytest.mark.parametrize(
    ("number", "dtype", "hides"),
    [
        (-math.inf, torch.float32, True),
        (-1e9, torch.float32, True),
        (-1e7, torch.float32, False),
        (-1e4, torch.float32, False),
        (-65504.0, torch.float16, True),
        (-1e4, torch.float16, False),
        (-1e9, torch.bfloat16, True),
    ],
)
def test_a_fill_hides_from_far_down(number: float, dtype: torch.dtype, hides: bool) -> None:
    x = X.to(dtype)
    breaks = Breaks()
    evaluate(export(lambda x, m: x.masked_fill(m, number), x, x > 0), x, x > 0, breaks=breaks)
    (found,) = breaks.found.values()
    assert found.fill == pytest.approx(number, rel=1e-2) and masks(found) == hides


def test_scores_below_a_fill_lie_outside() -> None:
    breaks = Breaks()
    program = export(lambda x, m: x.masked_fill(m, -1e9), X, X > 0)
    evaluate(program, X, X > 0, breaks=breaks)
    assert breaks.outside is None
    evaluate(program, X * 1e10, X > 0, breaks=breaks)
    assert breaks.outside is not None and "fill" in breaks.outside


def test_what_overflows_its_type_lies_outside() -> None:
    for dtype, size, out in ((torch.float16, 300.0, True), (torch.float16, 10.0, False), (torch.float32, 300.0, False)):
        breaks = Breaks()
        x = (X * size).to(dtype)
        evaluate(export(lambda x: x * x, x), x, breaks=breaks)
        assert (breaks.outside is not None) == out


def test_whole_numbers_in_a_narrow_type_wrap() -> None:
    small, large = torch.arange(4), torch.arange(4) + 200
    found = broken(lambda x: x.to(torch.int8), (small,))
    assert found.missing == ["wrapped"]
    assert not broken(lambda x: x.to(torch.int8), (small,), (large,)).missing
    assert broken(lambda x: x.to(torch.bfloat16), (small,)).missing == ["rounded"]


def test_casts_that_are_coarser_than_the_result() -> None:
    for inner, outer, coarse in (
        (torch.bfloat16, torch.float32, True),
        (torch.float16, torch.float32, True),
        (torch.float32, torch.bfloat16, False),
        (torch.float64, torch.float32, False),
    ):
        program = export(lambda x, inner=inner, outer=outer: x.to(inner).to(outer), X)
        nodes = [n for n in program.graph.nodes if n.op == "call_function"]
        assert bool(list(coarse_casts(nodes, outer))) == coarse
