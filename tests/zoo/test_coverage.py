"""The coverage matrix: the page says what was recorded, and what was recorded still holds."""

from __future__ import annotations

import pytest

from . import coverage
from .expected import UPSTREAM

pytest.importorskip("transformers")

RECORDED = coverage.recorded()
RIGHT = sorted(arch for arch, result in RECORDED.items() if result["stage"] == "done")


def test_the_page_is_the_table_of_what_was_recorded() -> None:
    assert coverage.TABLE.read_text() == coverage.table(RECORDED)


def test_nothing_recorded_as_right_has_keys_expanded_without_a_word() -> None:
    """Heads repeated before Attention are known: of these two, k and v have different heads, or heads in turn."""
    assert {arch for arch in RIGHT if RECORDED[arch]["expanded"]} <= {"diffllama", "jetmoe"}


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(set(coverage.architectures()) - set(UPSTREAM)))
def test_every_architecture(arch: str) -> None:
    """Exports with batch and sequence dynamic, gives PyTorch's numbers, and fuses what it did when it was recorded."""
    result = coverage.run(arch)
    assert result["stage"] == "done", result.get("error")
    if arch in RECORDED:
        assert list(result["fused"]) == list(RECORDED[arch]["fused"]), result["open"]
        assert result["expanded"] <= RECORDED[arch]["expanded"]
