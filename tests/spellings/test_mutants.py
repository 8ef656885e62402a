"""What only looks like an operator is left alone, or fused to something equal: none of the mutants is fused wrongly."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

import fxfuse

from .generator import EXPORT_SHAPE, SECOND_SHAPE
from .mutants import MUTANTS, SILENT, WIDTH, Mutant

MAGNITUDES = (1.0, 1e-3, 30.0)
"""Small inputs show what eps does, large ones what a clamp does."""


def exported(mutant: Mutant, model: nn.Module) -> ExportedProgram:
    batch, length = mutant.shape or EXPORT_SHAPE
    x = torch.randn(batch, length, WIDTH)
    dynamic = {} if mutant.shape else {0: Dim.AUTO, 1: Dim.AUTO}
    return torch.export.export(model, (x,), dynamic_shapes=(dynamic,), strict=False)


def worst_difference(mutant: Mutant, one: nn.Module, other: nn.Module) -> float:
    """The largest difference, relative to the largest output, over magnitudes and shapes."""
    worst = 0.0
    draws = torch.Generator().manual_seed(0)
    for shape in {mutant.shape or EXPORT_SHAPE, mutant.shape or SECOND_SHAPE}:
        for magnitude in MAGNITUDES:
            x = torch.randn(*shape, WIDTH, generator=draws) * magnitude
            with torch.no_grad():
                a, b = one(x), other(x)
            finite = a.isfinite()
            if a.shape != b.shape or not torch.equal(finite, b.isfinite()):
                return math.inf
            if finite.any():
                a, b = a[finite], b[finite]
                worst = max(worst, ((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item())
    return worst


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_not_fused_wrongly(mutant: Mutant) -> None:
    model = mutant.context(mutant.function).eval()
    if not mutant.random:
        assert worst_difference(mutant, mutant.context(mutant.honest).eval(), model) > 1e-3, "this is no mutant"
    fused = fxfuse.fuse(exported(mutant, model))
    counts = fxfuse.report(fused).counts
    if mutant.random:
        assert not counts, f"fused although it is random: {counts}"
    else:
        difference = worst_difference(mutant, model, fused.module())
        assert difference < 1e-3, f"fused wrongly ({counts}), off by {difference:.1e}"


def test_there_are_enough_mutants() -> None:
    assert len(MUTANTS) >= 40
    assert len({mutant.what for mutant in MUTANTS}) == len(MUTANTS)
    for operator in ("RMSNormalization", "RotaryEmbedding", "Attention"):
        assert sum(mutant.operator == operator for mutant in MUTANTS) >= 12


EXPLAINED = [
    *(m for m in MUTANTS if m.explained),
    *(
        pytest.param(m, marks=pytest.mark.xfail(reason="the report is silent about it"), id=str(m))
        for m in MUTANTS
        if m.what in SILENT
    ),
]


@pytest.mark.parametrize("mutant", EXPLAINED, ids=str)
def test_near_miss_is_explained(mutant: Mutant) -> None:
    """In words, and with the line of the model that it is about."""
    fused = fxfuse.fuse(exported(mutant, mutant.context(mutant.function).eval()))
    report = fxfuse.report(fused)
    near = [*report.near_misses(mutant.operator), *report.refused(mutant.operator)]
    print(mutant, *(f"\n    {e.reason}\n        {e.source}" for e in near))
    assert near, f"no near miss; the report:\n{fxfuse.report(fused)}"
    entry = near[-1]
    reason = re.sub(r" \(\S+@\S+\)$", "", entry.reason or "")  # without the name to overrule it by
    assert len(reason.split()) >= 5 and not re.search(r"Traceback|Error\b|[%_]\w", reason), f"no words: {reason!r}"
    where = re.match(r"mutants\.py:(\d+) ", entry.source or "")
    assert where and int(where[1]) in mutant.lines(), f"{entry.source}, and not lines {mutant.lines()}"
