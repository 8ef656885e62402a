"""However a meaning is spelled, it is fused: at least 95 % of all spellings, whole, and none wrongly."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch

import fxfuse

from .attention import Attention
from .generator import EXPORT_SHAPE, SECOND_SHAPE, ULP, Exported, Model, alone, at_random, check_equal, spellings
from .rms_norm import RMSNorm
from .rotary_embedding import Rotary

SHARE = 0.95
SOME = [(RMSNorm, 40), (Rotary, 30), (Attention, 30)]
ALL = [(RMSNorm, 240), (Rotary, 400), (Attention, 320)]


@dataclass(frozen=True)
class Outcome:
    """What became of one spelling."""

    exported: Exported
    wrong: str | None
    """How the fused program's numbers differ from the model's, if they do."""
    missed: str | None
    """What was not fused, if anything."""

    def __str__(self) -> str:
        made = ", ".join(f"{name}={option}" for name, option in self.exported.model.c.made.items())
        return f"{self.exported.spelling}: {self.wrong or self.missed}\n    {made}"


def fixed_sizes(program: torch.export.ExportedProgram) -> list[str]:
    """Batch or length of ``x`` where they are numbers: export leaves both symbolic."""
    (x,) = (n for n in program.graph.nodes if n.op == "placeholder" and n.target == "x")
    return [f"x.shape[{i}] = {size}" for i, size in enumerate(x.meta["val"].shape[:2]) if isinstance(size, int)]


def differs(exported: Exported, fused: torch.export.ExportedProgram) -> str | None:
    """Where the fused program is farther from the model in float64 than the model's own rounding explains."""
    for program, whose in ((fused, "fused"), (exported.program, "caller's own")):
        if fixed := fixed_sizes(program):
            return f"fusing has fixed sizes of the {whose} program that were dynamic: {fixed}"
    model, run = exported.model, fused.module()
    exact = exported.spelling.build(torch.float64)
    for shape in (EXPORT_SHAPE, SECOND_SHAPE):
        inputs = model.inputs(*shape)
        wide = tuple(value.double() if value.is_floating_point() else value for value in inputs)
        with torch.no_grad():
            eager, want = model(*inputs), exact(*wide)
            try:
                got = run(*inputs)
            except Exception as error:  # whatever it is: the model itself runs here
                return f"at {shape}: the fused program fails: {type(error).__name__}: {error}"
        if got.shape != eager.shape or got.dtype != eager.dtype:
            return f"at {shape}: {got.dtype} {tuple(got.shape)} instead of {eager.dtype} {tuple(eager.shape)}"
        own, its = ((value.double() - want).abs().max().item() for value in (eager, got))
        unit = ULP[model.dtype] * want.abs().max().item()
        if not its <= 4 * own + 16 * unit:
            return f"at {shape}: error {its:.2e}, the model's own {own:.2e}"
    return None


def judged(exported: Exported) -> Outcome:
    """Fuses one spelling and looks at what came of it."""
    fused = fxfuse.fuse(exported.program, frozen=True)
    model = exported.model
    count = fxfuse.report(fused).counts.get(model.operator, 0)
    left = model.leftovers(fused)
    missed = None
    if count != model.expected or left:
        missed = f"{count} of {model.expected} fused, left: {left or 'nothing'}"
        if reasons := [f"{e.status}: {e.reason}" for e in fxfuse.report(fused) if e.status != "fused"]:
            missed += f"\n    {reasons}"
    return Outcome(exported, differs(exported, fused), missed)


def hold(outcomes: Iterable[Outcome], expected: int) -> None:
    outcomes = list(outcomes)
    assert len(outcomes) == expected
    wrong = [o for o in outcomes if o.wrong]
    missed = [o for o in outcomes if o.missed]
    assert not wrong, f"{len(wrong)} of {len(outcomes)} fused wrongly:\n" + "\n".join(map(str, wrong))
    share = 1 - len(missed) / len(outcomes)
    listed = f"{share:.1%} of {len(outcomes)} fused; missed:\n" + "\n".join(map(str, missed))
    print(listed)
    assert share >= SHARE, listed


@pytest.mark.parametrize(("meaning", "count"), SOME)
def test_spellings_are_fused(meaning: type[Model], count: int) -> None:
    hold((judged(e) for e in spellings(meaning, count, singles=count // 2)), count)


@pytest.mark.slow
@pytest.mark.parametrize(("meaning", "count"), ALL)
def test_all_spellings_are_fused(meaning: type[Model], count: int) -> None:
    hold((judged(e) for e in spellings(meaning, count)), count)


@pytest.mark.parametrize("meaning", [RMSNorm, Rotary, Attention])
def test_spellings_are_equal_in_float64(meaning: type[Model]) -> None:
    """The generator's own promise, without export: every choice alone and sixty compositions."""
    for spelling in itertools.chain(alone(meaning), itertools.islice(at_random(meaning), 60)):
        check_equal(spelling)
