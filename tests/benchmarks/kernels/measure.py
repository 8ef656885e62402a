"""Checking, timing, and the record of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.kernels.problems import Problem, Run

Clock = Callable[[Run], float]
"""Takes what is to be timed, gives milliseconds."""

COPIES = [2**n for n in range(20, 31)]
"""Bytes that a copy reads and writes together."""


def do_bench(run: Run) -> float:
    """The median, with the L2 cache emptied before every repetition."""
    from triton.testing import do_bench as bench

    return float(bench(run, warmup=25, rep=100, return_mode="median"))


def copy_bandwidth(device: torch.device, clock: Clock, sizes: Iterable[int] = COPIES) -> list[dict[str, Any]]:
    """What a copy reaches at each size: the yardstick for what only moves data."""
    rows = []
    for size in sizes:
        source = torch.empty(size // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        ms = clock(lambda s=source, t=target: t.copy_(s))  # type: ignore[misc]
        rows.append({"bytes": size, "ms": ms, "GB/s": gb_per_s(size, ms)})
    return rows


def measure(problems: Iterable[Problem], clock: Clock, copies: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for every problem: milliseconds of each implementation, or why it did not run.

    An implementation whose result differs from the composite's is not timed: a fast wrong answer is no figure.
    """
    for problem in problems:
        expected = tensors(problem.runs["composite"]())
        ms: dict[str, float] = {}
        missing: dict[str, str] = {}
        for name, run in problem.runs.items():
            try:
                why = difference(tensors(run()), expected, problem.tolerance)
                if why is None:
                    ms[name] = clock(run)
            except Exception as error:  # not installed, no kernel for this shape, out of memory
                why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            if why is not None:
                missing[name] = why
        row: dict[str, Any] = {
            "op": problem.op,
            "shape": problem.shape,
            "dtype": str(problem.dtype).removeprefix("torch."),
            "ms": ms,
            "missing": missing,
            "times as long as fxfuse": {n: t / ms["fxfuse"] for n, t in ms.items()} if "fxfuse" in ms else {},
        }
        if problem.bytes:
            row["bytes"] = problem.bytes
            row["GB/s"] = {name: gb_per_s(problem.bytes, t) for name, t in ms.items()}
            # Of the copy that moves about as much: the largest that moves no more.
            copy = max((c for c in copies if c["bytes"] <= problem.bytes), key=lambda c: c["bytes"], default=None)
            row["of copy bandwidth"] = row["GB/s"].get("fxfuse", 0.0) / copy["GB/s"] if copy else None
        yield row


def difference(found: list[Tensor], expected: list[Tensor], tolerance: float) -> str | None:
    """How two results differ by more than rounding; None if they do not."""
    for ours, theirs in zip(found, expected, strict=False):
        if ours.shape != theirs.shape:
            return f"gives {list(ours.shape)} instead of {list(theirs.shape)}"
        error = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp(min=1e-6))
        if not error <= tolerance:
            return f"differs from the composite by {error:.2g} of the largest element"
    return None


def tensors(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def gb_per_s(size: int, ms: float) -> float:
    return size / ms / 1e6
