"""The property: a fused program computes what the unfused one does, and fusing it raises nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch.export import ExportedProgram

import fxfuse
from fxfuse.recognise.catalogue import unregister
from tests.adversaries.equal import difference
from tests.adversaries.examples import FUNCTIONS
from tests.adversaries.program import Program, Run
from tests.adversaries.programs import calls, programs
from tests.adversaries.rounding import flat

Fuse = Callable[[ExportedProgram, Program], ExportedProgram]
Calls = tuple[Run, ...]


@dataclass
class Coverage:
    """What has been drawn, so that a property that holds says something."""

    drawn: Counter[str] = field(default_factory=Counter)
    fused: Counter[str] = field(default_factory=Counter)
    harmless: int = 0
    """Programs that are the operator, with nothing broken in it."""
    runs: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    """Programs that torch does not export, by the error."""

    def __str__(self) -> str:
        families = (f"{name} {self.fused[name]}/{n}" for name, n in sorted(self.drawn.items()))
        total = sum(self.drawn.values())
        lines = [f"fused {self.share():.0%} of {total}: {', '.join(families)}; {self.harmless} are harmless"]
        lines.append("runs: " + ", ".join(f"{n} {kind}" for kind, n in self.runs.items()))
        if self.refused:
            lines.append("not exported: " + ", ".join(f"{n} {error}" for error, n in self.refused.items()))
        return "\n".join(lines)

    def share(self) -> float:
        return sum(self.fused.values()) / max(sum(self.drawn.values()), 1)


BATCH = 9
"""Examples a seed. After ten, hypothesis draws near copies of what it has drawn: many seeds draw more."""


def drawn_with(
    number: int, family: str | None = None
) -> Callable[[Callable[[Program, Calls], None]], Callable[[], None]]:
    """The function, for a batch of programs and calls that are the same ones each time."""

    def decorate(function: Callable[[Program, Calls], None]) -> Callable[[], None]:
        slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
        options = settings(
            max_examples=BATCH,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=slow,
        )

        def given_both(program: Program, runs: Calls) -> None:
            function(program, runs)

        return seed(number)(options(given(program=programs(family), runs=calls())(given_both)))

    return decorate


class WrongFusion(AssertionError):
    """A number that fusing changed, or an error that it raised."""


@contextmanager
def examples_as_patterns() -> Iterator[Fuse]:
    """How programs are fused: with the catalogue, or with the one pattern by example that they are near."""
    patterns = {name: fxfuse.pattern(replacement=f, ulp=8.0)(f) for name, f in FUNCTIONS.items()}
    for name in patterns:  # each is looked for in its own programs only
        unregister(name)

    def fuse(program: ExportedProgram, drawn: Program) -> ExportedProgram:
        return fxfuse.fuse(program, patterns=None if drawn.pattern is None else [patterns[drawn.pattern]])

    yield fuse


def unfused(program: ExportedProgram, drawn: Program) -> ExportedProgram:
    """Nothing is looked for."""
    return fxfuse.fuse(program, patterns=[])


def decomposed(program: ExportedProgram, drawn: Program) -> ExportedProgram:
    """Nothing is looked for, and all is computed in another order: attention is written out, means are sums."""
    return fxfuse.fuse(program.run_decompositions(), patterns=[])


def check(drawn: Program, runs: Sequence[Run], fuse: Fuse, coverage: Coverage) -> None:
    """Raises:
    WrongFusion: with the call and the element.
    """
    made = _prepared(drawn, fuse)
    if isinstance(made, str):
        coverage.refused[made] += 1
        return
    program, fused = made
    coverage.drawn[drawn.family] += 1
    coverage.harmless += drawn.harmless
    names = [f"{e.operator} {e.parameters}" for e in fxfuse.report(fused) if e.status == "fused"]
    coverage.fused[drawn.family] += bool(names)
    for run in runs:
        wrong = _one(drawn, run, program, fused, coverage)
        if wrong:
            raise WrongFusion(f"{run}\n{wrong}\nfused: {'; '.join(names)}")


@lru_cache(maxsize=64)  # while hypothesis shrinks the calls, the program is the same
def _prepared(drawn: Program, fuse: Fuse) -> tuple[ExportedProgram, ExportedProgram] | str:
    """The program and the fused one; or the error for which torch does not capture it."""
    try:
        program = drawn.export()
    except Exception as error:
        return type(error).__name__
    try:
        return program, fuse(program, drawn)
    except Exception as error:
        raise WrongFusion(f"fuse raises {type(error).__name__}: {error}") from error


def _one(drawn: Program, run: Run, program: ExportedProgram, fused: ExportedProgram, coverage: Coverage) -> str:
    inputs = drawn.arguments(run)
    if not drawn.accepts(inputs):
        coverage.runs["beyond a fill"] += 1
        return ""
    try:
        expected = _call(program, inputs)
    except Exception:  # sizes that the program does not take
        coverage.runs["refused"] += 1
        return ""
    coverage.runs["compared"] += 1
    try:
        actual = _call(fused, inputs)
    except Exception as error:
        return f"the fused program raises {type(error).__name__}: {error}"
    return str(difference(program, inputs, expected, actual) or "")


def _call(program: ExportedProgram, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    module: Any = program.module()
    with torch.no_grad():
        return flat(module(*(t.clone() for t in inputs)))
