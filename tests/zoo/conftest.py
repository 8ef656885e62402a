"""Every model of the zoo also shows that the caller's program is left as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unchanged import all_left_as_they_were


@pytest.fixture(autouse=True)
def callers_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with all_left_as_they_were(monkeypatch):
        yield
