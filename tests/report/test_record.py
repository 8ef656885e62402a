"""The report as JSON: every record keeps to the schema, and the schema says something."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import nn

from fxfuse.cli import main
from fxfuse.parity import compare
from fxfuse.report.model import Report
from fxfuse.report.record import as_json, dumps, record, schema


def check(value: Any) -> None:
    jsonschema.validate(value, schema(), jsonschema.Draft202012Validator)


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())


def test_a_report_keeps_to_it(report: Report) -> None:
    assert {e.status for e in report} == {"fused", "near miss"}
    loaded = json.loads(dumps(record(report)))
    check(loaded)
    assert loaded["counts"] == report.counts
    assert [e["operator"] for e in loaded["report"]["entries"]] == [e.operator for e in report]


@pytest.mark.parametrize(
    "path, value",
    [
        (("schema_version",), 2),
        (("report", "opset"), 22),
        (("report", "entries", 0, "status"), "maybe"),
        (("report", "entries", 0, "reason"), "fused entries have none"),
        (("report", "entries", "near miss", "reason"), None),
        (("report", "entries", 0, "colour"), "red"),
        (("report", "layer", "before", 0, "entry"), -1),
        (("counts", "Attention"), "two"),
        (("parity",), [{"backend": "ONNX Runtime"}]),
    ],
)
def test_the_schema_refuses(report: Report, path: tuple[str | int, ...], value: object) -> None:
    loaded: Any = copy.deepcopy(record(report))
    inner = loaded
    for key in path[:-1]:
        inner = inner[[e.status for e in report].index("near miss") if key == "near miss" else key]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(loaded)


def test_what_json_lacks_is_text(report: Report) -> None:
    failed = compare([torch.zeros(2)], [torch.zeros(3)]).to_dict()
    assert math.isinf(failed["max_abs"])
    parity = [{"backend": "b", "case": "c", "sizes": "2", "result": failed}]
    loaded = json.loads(dumps(record(report, parity=parity)))
    check(loaded)
    assert loaded["parity"][0]["result"]["max_abs"] == "inf"
    assert as_json({1: (torch.float16, True, 2, 0.5)}) == {"1": ["torch.float16", True, 2, 0.5]}


def test_the_command_writes_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.RMSNorm(8, eps=1e-5), nn.Linear(8, 4)).eval()
    torch.export.save(torch.export.export(model, (torch.randn(2, 3, 8),)), tmp_path / "m.pt2")
    for command in (["inspect"], ["export", "--out", str(tmp_path / "out")]):
        path = tmp_path / f"{command[0]}.json"
        assert main([command[0], str(tmp_path / "m.pt2"), *command[1:], "--report", str(path)]) == 0
        loaded = json.loads(path.read_text(encoding="utf-8"))
        check(loaded)
        assert loaded["counts"] == {"RMSNormalization": 1} and loaded["seconds"]["fuse"] > 0
    check(json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8")))
    assert [c["backend"] for c in loaded["parity"]] and loaded["bytes"]["model.onnx"] > 0
