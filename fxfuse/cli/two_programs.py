"""``fxfuse verify``: a fused program on disk, proven against its original on disk."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fxfuse
from fxfuse.cli.progress import Stages
from fxfuse.cli.source import saved_program
from fxfuse.errors import FxfuseError, ParityError
from fxfuse.files import staging
from fxfuse.report.record import as_json, dumps


def verify(arguments: argparse.Namespace, out: Console, err: Console) -> None:
    """Prove again that the fused program computes what the original does.

    Raises:
        FxfuseError: bad input.
        ParityError: they differ, or could not be proven to be the same. The report says so too.
    """
    report: Path | None = arguments.report
    if report is not None and report.suffix != ".json":
        raise FxfuseError("what was verified is written as .json", where=f"--report {report}")
    if report is not None and report.is_dir():
        raise FxfuseError("the report's file is a folder", where=f"--report {report}")
    stages = Stages(err)
    # Whether the report can be written is found out here, before the long work.
    with nullcontext() if report is None else staging(report.absolute().parent, report.name) as folder:
        with stages.stage("load"):
            original, fused = saved_program(arguments.original), saved_program(arguments.fused)
        result: dict[str, Any]
        refused: ParityError | None = None
        with stages.stage("verify"):
            try:
                done = fxfuse.verify(original, fused)
                result = done.to_dict()
            except ParityError as error:
                refused = error
                result = {"refused": {"what": error.what, "where": error.where}}
        if report is not None and folder is not None:
            record = {
                "original": str(arguments.original),
                "fused": str(arguments.fused),
                "fxfuse": fxfuse.__version__,
                "torch": torch.__version__,
                "verified": refused is None,
                **result,
                "seconds": stages.seconds,
            }
            (folder / report.name).write_text(dumps(as_json(record)), encoding="utf-8")
            (folder / report.name).replace(report)
    if refused is not None:
        raise refused
    out.print(str(done), markup=False, highlight=False, soft_wrap=True)
