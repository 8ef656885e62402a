"""Whatever is read of a drawn program's tensors is what the program computes, at lengths it was not captured for."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.proof.drawn import TABLES, function, programs
from tests.proof.reading import check

SEEDS = 8
EXAMPLES = 9
"""A seed: hypothesis draws near copies of what it has drawn after about ten."""


@pytest.mark.parametrize("number", [pytest.param(n, marks=() if n < SEEDS else pytest.mark.slow) for n in range(60)])
def test_no_reading_is_wrong(number: int) -> None:
    seen: Counter[str] = Counter()

    @seed(number)
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(programs())
    def drawn(lines: tuple[str, ...]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                answers = check(function(lines), **TABLES)
            except AssertionError as error:
                if "no other length" in str(error):
                    return
                raise
            except Exception as error:  # torch does not capture it
                seen[type(error).__name__] += 1
                return
        seen.update("read" if a == "read" else "not read" for a in answers)

    drawn()
    print(dict(seen))
    assert seen["read"] > seen["not read"] / 4, seen
