"""What each pattern does to a graph, as texts that can be read without running anything.

A text that no longer holds is written anew by `python -m tests.golden`, and its diff is what a reviewer looks at.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.case import Case, cases

CASES = cases()


@pytest.mark.parametrize(("path", "case"), CASES.items(), ids=[f"{p.parent.name}-{p.stem}" for p in CASES])
def test_the_rewrite_is_what_the_text_says(path: Path, case: Case) -> None:
    assert case.text() == path.read_text()


def test_every_text_has_a_case() -> None:
    folders = {path.parent for path in CASES}
    assert len(folders) >= 7
    assert {path for folder in folders for path in folder.glob("*.txt")} == CASES.keys()
