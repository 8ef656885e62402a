"""The coverage matrix: the pages say what was recorded, and what was recorded still holds."""

from __future__ import annotations

import pytest

from . import coverage, pages
from .expected import UPSTREAM

pytest.importorskip("transformers")

RECORDED = pages.DECODERS.recorded()
RIGHT = sorted(arch for arch, result in RECORDED.items() if result["stage"] == "done")
ENCODERS = pages.ENCODERS.recorded()
SOME = ("text/bert", "text/modernbert", "text/esm", "images/vit", "images/dinov2", "sound/wav2vec2", "features/whisper")
"""Encoders of the default run; the slow run has all that are right."""


@pytest.mark.parametrize("page", [pages.DECODERS, pages.ENCODERS], ids=["decoders", "encoders"])
def test_the_page_is_the_table_of_what_was_recorded(page: pages.Page) -> None:
    assert page.page.read_text() == page.table()


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


@pytest.mark.parametrize(
    "name",
    [
        name if name in SOME else pytest.param(name, marks=pytest.mark.slow)
        for name, result in ENCODERS.items()
        if result["stage"] == "done"
    ],
)
def test_every_encoder(name: str) -> None:
    result = coverage.run_encoder(name)
    assert result["stage"] == "done", result.get("error")
    assert all(got >= ever for got, ever in zip(result["fused"], ENCODERS[name]["fused"], strict=True)), result["open"]
