"""The report as JSON: one object per run, described by `schema.json` and checked against it in the tests."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import resources
from typing import Any

from fxfuse.report.model import Report

VERSION = 1
"""The version of the schema. Within one version keys may be added; none is removed or changes its meaning."""


def record(report: Report, **run: Any) -> dict[str, Any]:
    """The report, and what is known of the run that made it, as JSON's own types.

    Args:
        report: what fusing did.
        run: the other keys of the schema that apply: `source`, `parity`, `bytes`, `seconds`, …
    """
    plain: dict[str, Any] = as_json(
        {"schema_version": VERSION, **run, "counts": report.counts, "report": report.to_dict()}
    )
    return plain


def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) that every record keeps to."""
    text = resources.files("fxfuse.report").joinpath("schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def dumps(record: Mapping[str, Any]) -> str:
    """The text of the file."""
    return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_json(value: Any) -> Any:
    """`value` in JSON's types. What JSON has no type for (symbols, dtypes, infinities) becomes text."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int) and type(value) is int:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [as_json(item) for item in value]
    return str(value)
