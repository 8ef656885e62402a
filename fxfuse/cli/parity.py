"""``fxfuse parity``: every implementation of the operators, or of a model, against float64."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from fxfuse import kernels
from fxfuse.cli import source
from fxfuse.cli.commands import load_program, request_of
from fxfuse.cli.progress import Stages
from fxfuse.errors import FxfuseError, ParityError
from fxfuse.files import staging
from fxfuse.ops.opsets import check_opset
from fxfuse.parity import matrix
from fxfuse.parity.cell import IMPLEMENTATIONS, Cell
from fxfuse.parity.environment import environment
from fxfuse.parity.operators import cells as operator_cells
from fxfuse.parity.plot import plot
from fxfuse.parity.programs import check_device, program_cells
from fxfuse.parity.summary import failures, notes, rows

SHOWN = 20
"""At most this many failures are printed one by one; the JSON file has all of them."""


def parity(arguments: argparse.Namespace, out: Console, err: Console) -> None:
    """Compare, print the table, write what was asked for.

    Raises:
        FxfuseError: bad input.
        ParityError: an implementation computes something else.
    """
    device = check_device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_opset(arguments.opset)
    operators = _operators(arguments)
    if device.type == "cpu" and kernels.installed():
        kernels.interpret()  # before any export, which would import Triton as a compiler
    with json_file(arguments.json) as write_json:
        record = environment(device)
        if arguments.source is None:
            cells = _operator_cells(operators, arguments.full, device, err)
        else:
            cells = _program_cells(arguments, device, err)
        failed = failures(cells)
        _show(out, arguments, cells, record)
        if arguments.plot is not None:
            plot(cells, arguments.plot, _title(record))
        write_json(
            {
                "command": ["fxfuse", *sys.argv[1:]],
                **record,
                "failed": len(failed),
                "cells": [cell.to_dict() for cell in cells],
            }
        )
    if failed:
        raise ParityError(
            f"{len(failed)} of {len(cells)} comparisons failed: {failed[0].reason}",
            where=str(failed[0]),
            hint="--json FILE lists them all",
        )


@contextmanager
def json_file(path: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes a record to `path`. Whether it can be written is found out here, before the long work."""
    if path is None:
        yield lambda record: None
        return
    if path.is_dir():
        raise FxfuseError("the record's file is a folder", where=f"--json {path}")
    with staging(path.absolute().parent, path.name) as folder:

        def write(record: dict[str, Any]) -> None:
            (folder / path.name).write_text(json.dumps(record, indent=2, default=str))
            (folder / path.name).replace(path)

        yield write


def _operators(arguments: argparse.Namespace) -> list[str]:
    """The operators whose matrices are to be run. Options that do not fit are refused here, before the long work."""
    known = matrix.operators()
    for name in arguments.op:
        if name not in known:
            raise FxfuseError(f"no operator {name!r}", where="--op", hint="one of " + ", ".join(known))
    if arguments.source is not None and (arguments.op or arguments.full):
        raise FxfuseError("--op and --full are for the operators, not for a model", where=arguments.source)
    if arguments.source is None:
        for option in ("options", "dtype", "checkpoint", "batch", "seq", "allow_missing"):
            if getattr(arguments, option):
                raise FxfuseError(
                    f"--{option.replace('options', 'set').replace('_', '-')} is for a model", hint="name a SOURCE"
                )
    if arguments.plot is not None and not Path(arguments.plot).absolute().parent.is_dir():
        raise FxfuseError("no such folder", where=f"--plot {arguments.plot}")
    return list(arguments.op or known)


def _operator_cells(operators: list[str], full: bool, device: torch.device, err: Console) -> list[Cell]:
    found: list[Cell] = []
    with Progress(console=err, transient=True) as progress:
        for name in operators:
            calls = list(matrix.calls(name, "all" if full else "pairs"))
            for call in progress.track(calls, description=name):
                found += operator_cells(call.on(device))
    return found


def _program_cells(arguments: argparse.Namespace, device: torch.device, err: Console) -> list[Cell]:
    """Comparisons of the model in every dtype that it can be built in; a saved program only in its own."""
    saved = arguments.source.endswith(".pt2")
    dtypes = [arguments.dtype] if arguments.dtype or saved else list(source.DTYPES)
    found: list[Cell] = []
    stages = Stages(err)
    for dtype in dtypes:
        arguments.dtype = dtype
        _, lifted = load_program(request_of(arguments), stages)
        with stages.stage("compare"):
            found += program_cells(arguments.source, lifted.program, opset=arguments.opset, device=device)
    return found


def _title(record: dict[str, Any]) -> str:
    return f"{record['device']}, Triton {record['triton']}, {record['date'][:10]}"


def _show(out: Console, arguments: argparse.Namespace, cells: list[Cell], record: dict[str, Any]) -> None:
    found = rows(cells)
    subjects = list(dict.fromkeys(row.subject for row in found))
    name = subjects[0] + ": l" if len(subjects) == 1 else "L"
    table = Table(
        title=f"{escape(name)}argest error against float64, in ulp\n{escape(_title(record))}",
        title_justify="left",
        title_style="bold",
        caption="an ulp is one unit in the last place at the output's RMS; red: failed"
        + ("" if arguments.source is None else "; for a 16-bit model float32 stands in for float64"),
        caption_justify="left",
    )
    # A column whose entry is the same in every row is left out.
    model = arguments.source is not None
    labels = {"operator": len(subjects) > 1, "type": True, "shape": model, "calls": not model}
    for label in (label for label, wanted in labels.items() if wanted):
        table.add_column(label, justify="right" if label == "calls" else "left")
    for label in IMPLEMENTATIONS:
        table.add_column(label, justify="right", no_wrap=True)
    for row in found:
        texts = zip((row.subject, row.dtype, row.case, str(row.calls)), labels.values(), strict=True)
        numbers = [_number(row.worst(n), row.ran(n), row.failed(n), row.calls) for n in IMPLEMENTATIONS]
        table.add_row(*(escape(text) for text, wanted in texts if wanted), *numbers)
    out.print(table)
    for (implementation, note), count in sorted(notes(cells).items()):
        out.print(f"{implementation} {note} ({count} times)", markup=False, highlight=False)
    failed = failures(cells)
    for cell in failed[:SHOWN]:
        out.print(f"failed: {cell}: {cell.reason}", markup=False, highlight=False)
    if len(failed) > SHOWN:
        out.print(f"and {len(failed) - SHOWN} more", highlight=False)


def _number(worst: float | None, ran: int, failed: int, calls: int) -> str:
    """``"2.31"``, with the count of calls where not all of them ran."""
    if worst is None:
        return "–"
    text = f"{worst:.3g}" + (f" ({ran})" if ran < calls else "")
    return f"[red]{text}, {failed} failed[/]" if failed else text
