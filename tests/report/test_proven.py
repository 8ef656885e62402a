"""Evidence in the report: a line for each kind as text, unfolded on the page, whole as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import jsonschema
import pytest
import torch
from torch import nn
from torch.export import Dim

import fxfuse
from fxfuse.proof.evidence import BreakEvidence, Evidence
from fxfuse.report.html import fragment
from fxfuse.report.model import Entry, Report
from fxfuse.report.proven import LONGEST, lines, proven
from fxfuse.report.record import dumps, record, schema
from tests.report.test_html import parsed

PLAIN = Evidence(6, ({"s0": 3, "s1": 5}, {"s0": 1, "s1": 2}), (1.0, 1e-3, 1e3), error=0.25, rounding=1.5)
CLAMP = BreakEvidence("clamp@model.py:3", ("above",), {"below": "the bound lies at the end of its range"})
RICH = replace(
    PLAIN,
    breaks=(CLAMP,),
    claims=("causal at every length (z3)",),
    differences=("rows without keys are 0", "accepted clamp@model.py:3: where it is above 3, the two differ"),
    accepted=("clamp@model.py:3",),
)


def report_of(*evidence: Evidence | None) -> Report:
    return Report(24, [Entry("Attention", "fused", ("a",), "b", evidence=e, source="model.py:4") for e in evidence])


def test_what_is_alike_is_one_line() -> None:
    (kind,) = proven(report_of(PLAIN, replace(PLAIN, error=0.5, draws=4), None))
    assert (kind.count, kind.evidence.draws, kind.evidence.error) == (2, 4, 0.5), "what holds for both"
    assert len(proven(report_of(PLAIN, RICH, PLAIN))) == 2


def test_the_text_has_a_line_for_each_kind() -> None:
    text = str(report_of(PLAIN, PLAIN, RICH))
    assert "proven: Attention (×2): 6 draws at 0.001 … 1000, 2 sizes, off by 0.25 of rounding\n" in text
    (rich,) = [line for line in text.splitlines() if "causal at every length" in line]
    assert "clamp@model.py:3 (above; below cannot be: the bound" in rich and "accepted" not in rich
    assert "Attention: accepted clamp@model.py:3: where it is above 3, the two differ" in text


def test_a_line_is_not_too_long() -> None:
    many = replace(PLAIN, breaks=tuple(replace(CLAMP, name=f"clamp@model.py:{i}") for i in range(50)))
    (line,) = lines(report_of(many))
    assert len(line) <= LONGEST + len("proven: Attention: ") and line.endswith("…")


def test_the_page_unfolds_it() -> None:
    text = fragment(report_of(PLAIN, RICH))
    parsed(text)
    assert "Why it is the same" in text
    for word in (
        "6 sets of inputs, times 1, 0.001, 1e+03",
        "s0=3 s1=5",
        "clamp@model.py:3",
        "compared where above",
        "below cannot be: the bound lies at the end of its range",
        "causal at every length (z3)",
        "where it is above 3, the two differ",
        "0.25 of what float64 may lose",
        "1.5 units in the last place",
    ):
        assert word in text, word


def test_json_has_it_whole() -> None:
    loaded = json.loads(dumps(record(report_of(PLAIN, RICH, replace(PLAIN, error=math.inf), None))))
    jsonschema.validate(loaded, schema(), jsonschema.Draft202012Validator)
    entries = loaded["report"]["entries"]
    assert entries[1]["evidence"]["breaks"] == [
        {"name": CLAMP.name, "pieces": ["above"], "beyond": {"below": "the bound lies at the end of its range"}}
    ]
    assert entries[1]["evidence"]["accepted"] == ["clamp@model.py:3"] and entries[3]["evidence"] is None
    described = schema()["$defs"]["evidence"]["properties"]
    assert set(described) == set(RICH.to_dict()) and all("description" in d for d in described.values())


@pytest.mark.parametrize("key", ["draws", "claims"])
def test_the_schema_refuses_evidence_that_lacks_something(key: str) -> None:
    loaded = json.loads(dumps(record(report_of(RICH))))
    del loaded["report"]["entries"][0]["evidence"][key]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(loaded, schema(), jsonschema.Draft202012Validator)


def test_a_refusals_name_is_in_all_three() -> None:
    class Bounded(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.clamp(max=1e5).pow(2).mean(-1, keepdim=True) + 1e-5)

    program = torch.export.export(Bounded(), (torch.randn(2, 3, 8),), dynamic_shapes=({0: Dim.AUTO},))
    report = fxfuse.report(fxfuse.fuse(program))
    (entry,) = report
    assert entry.name is not None and entry.name.startswith("clamp@test_proven.py:")
    assert f"named {entry.name}" in str(report) and f"named <code>{entry.name}</code>" in fragment(report)
    loaded = json.loads(dumps(record(report)))
    jsonschema.validate(loaded, schema(), jsonschema.Draft202012Validator)
    assert loaded["report"]["entries"][0]["name"] == entry.name

    accepted = fxfuse.report(fxfuse.fuse(program, accept=[entry.name]))
    assert f"RMSNormalization: accepted {entry.name}: where what it bounds is above 100000" in str(accepted)
    assert f"accepted {entry.name}: " in fragment(accepted)
