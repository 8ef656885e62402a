"""Every idiom of the catalogue, fused and exported, against eager flex_attention; its page is what was measured."""

from __future__ import annotations

import pytest
import torch._dynamo

from tests.patterns.flex_attention.catalogue import PAGE, Row, load, render
from tests.patterns.flex_attention.checks import check
from tests.patterns.flex_attention.idioms import IDIOMS

BOUND = 1e-5
SAMPLE = {
    "padded_both": 23,
    "natten": 24,
    "softcap_window": 23,
    "both_scales": 24,
    "sinks_column": 23,
    "sinks_lse": 24,
    "log_sum_exp": 24,
    "clamped": 23,
}
"""One of a kind, in ONNX Runtime at this opset; all others are slow tests."""


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def name(entry):
    return entry.define.__name__


def agrees(entry, outcome):
    assert outcome.whole == entry.whole, outcome.encoding
    assert outcome.error < BOUND
    assert outcome.encoding == load()[entry.name].encoding, "run python -m tests.patterns.flex_attention.catalogue"


@pytest.mark.parametrize("entry", [e for e in IDIOMS if name(e) in SAMPLE], ids=name)
def test_one_of_each_kind(entry):
    """Batch and length free, at the exported length and at another, in PyTorch and in ONNX Runtime."""
    agrees(entry, check(entry, dynamic=True, opset=SAMPLE[name(entry)]))


@pytest.mark.slow
@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("entry", IDIOMS, ids=name)
def test_every_idiom(entry, dynamic, opset):
    outcome = check(entry, dynamic=dynamic, opset=opset)
    assert outcome.whole == entry.whole, outcome.encoding
    assert outcome.error < BOUND


def test_the_page_is_what_was_measured():
    rows = load()
    assert list(rows) == [e.name for e in IDIOMS], "run python -m tests.patterns.flex_attention.catalogue"
    assert PAGE.read_text() == render(rows.values())


def test_most_are_one_node_and_none_fails():
    rows = [Row(**vars(row)) for row in load().values()]
    assert len(rows) == 80
    assert sum(row.whole for row in rows) >= 70
    assert max(row.error for row in rows) < BOUND
