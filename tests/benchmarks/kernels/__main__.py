"""``python -m tests.benchmarks.kernels``: see the package."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import tests.benchmarks.kernels as package
from fxfuse import kernels
from fxfuse.parity.environment import environment
from tests.benchmarks.kernels.measure import Clock, copy_bandwidth, do_bench, measure
from tests.benchmarks.kernels.picture import draw
from tests.benchmarks.kernels.problems import FULL, PROBLEMS


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog=package.__name__
    )
    parser.add_argument("--op", action="append", choices=[*PROBLEMS], help="only this operator; repeatable")
    parser.add_argument("--sizes", choices=[FULL, "some"], default=FULL)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record here, as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw achieved bandwidth: .png or .svg")
    return parser.parse_args(argv)


def record_of(options: argparse.Namespace, device: torch.device, clock: Clock, copies: list[int]) -> dict[str, Any]:
    """Everything measured, printed line by line as it comes."""
    record: dict[str, Any] = {
        "command": f"python -m {package.__name__} " + " ".join(sys.argv[1:]),
        **environment(device),
    }
    record["copies"] = copy_bandwidth(device, clock, copies)
    record["rows"] = []
    for name in options.op or PROBLEMS:
        for row in measure(PROBLEMS[name](options.sizes, device), clock, record["copies"]):
            record["rows"].append(row)
            print(line(row), flush=True)
    return record


def line(row: dict[str, Any]) -> str:
    shape = " ".join(f"{name}={value}" for name, value in row["shape"].items())
    times = "  ".join(f"{name} {ms:.4f} ms" for name, ms in row["ms"].items())
    copy = f"  {row['of copy bandwidth']:.0%} of copy" if row.get("of copy bandwidth") else ""
    missing = "".join(f"\n    {name}: {why}" for name, why in row["missing"].items())
    return f"{row['op']} {row['dtype']} {shape}:  {times}{copy}{missing}"


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    why = kernels.missing("cuda")
    if why is not None or kernels.interpreting():
        why = why or "TRITON_INTERPRET is set, and the interpreter's times mean nothing"
        print(f"nothing was measured: {why}. These figures come from a GPU only.", file=sys.stderr)
        return 2
    from tests.benchmarks.kernels.measure import COPIES

    record = record_of(options, torch.device("cuda"), do_bench, COPIES)
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1))
    if options.plot is not None:
        draw(record, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
