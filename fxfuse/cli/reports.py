"""``--report FILE``: the report as a page (.html) or as data (.json)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

import fxfuse
from fxfuse.cli.progress import Stages, human, peak_memory
from fxfuse.errors import FxfuseError
from fxfuse.files import staging
from fxfuse.parity.eager import Check
from fxfuse.report.html import page
from fxfuse.report.model import Report
from fxfuse.report.record import dumps, record

REPORT = "report.json"
Write = Callable[[Report, Mapping[str, Any], Sequence[Check]], None]


@contextmanager
def report_files(paths: Sequence[Path]) -> Iterator[Write]:
    """A function that writes the report to all `paths`. Whether they can be written is found out before the long work.

    Raises:
        FxfuseError: a file that is neither .html nor .json, or that cannot be written.
    """
    for path in paths:
        if path.suffix not in (".html", ".json"):
            raise FxfuseError(
                f"a report is written as .html or as .json, not as {path.suffix or 'a file without suffix'}",
                where=f"--report {path}",
            )
        if path.is_dir():
            raise FxfuseError("the report's file is a folder", where=f"--report {path}")
    with ExitStack() as stack:
        folders = [stack.enter_context(staging(path.absolute().parent, path.name)) for path in paths]

        def write(report: Report, record: Mapping[str, Any], checks: Sequence[Check]) -> None:
            for path, folder in zip(paths, folders, strict=True):
                text = dumps(record) if path.suffix == ".json" else _page(report, record, checks)
                (folder / path.name).write_text(text, encoding="utf-8")
                (folder / path.name).replace(path)

        yield write


def _page(report: Report, record: Mapping[str, Any], checks: Sequence[Check]) -> str:
    sizes = {name: human(size) for name, size in record["bytes"].items()}
    facts = {
        "fxfuse": record["fxfuse"],
        "torch": record["torch"],
        "peak memory": human(record["peak_memory_bytes"]),
        **sizes,
    }
    return page(report, record["source"], checks=checks, seconds=record["seconds"], facts=facts)


def run_record(
    arguments: argparse.Namespace,
    report: Report,
    stages: Stages,
    checks: list[Check],
    sizes: dict[str, int],
    **others: Any,
) -> dict[str, Any]:
    """What `report.json` says of one run of a command."""
    return record(
        report,
        source=arguments.source,
        fxfuse=fxfuse.__version__,
        torch=torch.__version__,
        parity=[check.to_dict() for check in checks],
        bytes=sizes,
        seconds=stages.seconds,
        peak_memory_bytes=peak_memory(),
        **others,
    )
