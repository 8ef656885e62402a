"""What decoding allocates, step by step: a cache in place stays what it was, a growing one is copied and grows.

Allocated bytes are counted, not resident ones: they depend neither on the machine's load nor on which pages were
written to.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.memory import TOKEN, measured

STEPS = 256

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")


def grown(form: str) -> int:
    found = measured(form, STEPS)
    return found[-1] - found[0]


@pytest.mark.slow
def test_a_step_in_place_takes_no_more_than_the_one_before() -> None:
    assert grown("whole") <= STEPS * TOKEN / 8


@pytest.mark.slow
def test_a_growing_cache_grows() -> None:
    """What a static cache's attention reads is sliced off, and so grows with the context, but by a layer at a time."""
    growing = grown("growing")
    assert growing >= STEPS * TOKEN, "it holds every token"
    assert grown("static") <= growing / 3
