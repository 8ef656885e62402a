"""Fusing changes no number, in programs that are drawn around every operator.

pytest tests/adversaries                   153 programs, always the same ones
pytest tests/adversaries -m adversaries    3006 more
python -m tests.adversaries --count 500    all that is wrong with as many, unshrunk
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from tests.adversaries.program import Program
from tests.adversaries.property import (
    Calls,
    Coverage,
    Fuse,
    check,
    decomposed,
    drawn_with,
    examples_as_patterns,
    unfused,
)

FEW, MANY = 17, 334
"""Batches of nine."""
SAMPLE = 6
"""Batches of which the share that is fused is counted."""
FUSED = 0.25
"""The share that has to be fused, or the property says little."""


@pytest.fixture(scope="module")
def fuse() -> Iterator[Fuse]:
    with examples_as_patterns() as patterns:
        yield patterns


@pytest.fixture(autouse=True)
def one_quiet_thread() -> Iterator[None]:
    """The programs are tiny; and what torch logs of each export would hide the one that failed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trace, nothing = logging.getLogger("torch.__trace"), logging.Filter("nothing")
    trace.addFilter(nothing)
    yield
    trace.removeFilter(nothing)
    torch.set_num_threads(threads)


def holds(batch: int, fuse: Fuse) -> None:
    coverage = Coverage()

    @drawn_with(batch)
    def fusing_changes_no_number(program: Program, runs: Calls) -> None:
        check(program, runs, fuse, coverage)

    fusing_changes_no_number()
    print(coverage)


@pytest.mark.parametrize("batch", range(FEW))
def test_fusing_changes_no_number(batch: int, fuse: Fuse) -> None:
    holds(batch, fuse)


@pytest.mark.slow
@pytest.mark.adversaries
@pytest.mark.parametrize("batch", range(FEW, FEW + MANY))
def test_fusing_changes_no_number_in_many(batch: int, fuse: Fuse) -> None:
    holds(batch, fuse)


def test_a_good_share_is_fused(fuse: Fuse) -> None:
    """The property is not one of programs that are left alone."""
    coverage = Coverage()
    for batch in range(SAMPLE):

        @drawn_with(batch)
        def count(program: Program, runs: Calls) -> None:
            check(program, (), fuse, coverage)

        count()
    print(coverage)
    assert coverage.share() >= FUSED, coverage
    assert coverage.harmless >= 0.3 * sum(coverage.drawn.values()), coverage
    assert not coverage.refused, coverage


@pytest.mark.parametrize(("other", "batches"), [(unfused, 2), (decomposed, 1)])
def test_the_property_holds_where_nothing_is_fused(other: Fuse, batches: int) -> None:
    for batch in range(batches):
        holds(batch, other)
