"""What a step of a streaming cache costs, and that its memory is bounded: ``python -m tests.benchmarks.streaming``.

The model of `tests.benchmarks.decode`, sinks and a window of C tokens, far beyond which it has read:

    any           the graph for any number of tokens, a token at a time
    one           the graph for one token, in place
    growing C     fxfuse's graph whose cache grows, at C tokens of context; 2 C, 4 C

each driven by `fxfuse.runtime`, on ONNX Runtime's CPU provider with one thread, in turn, step by step, in one process.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch

from fxfuse.decoder.export import export_decoder, export_step
from fxfuse.package.write import PREFILL, write_package
from fxfuse.runtime import Session
from tests.benchmarks.decode import SHAPE, Bound, measure, memory_of, model, prompt

MULTIPLES = (1, 2, 4)


class Streaming:
    """A session that has read three times what it keeps."""

    def __init__(self, path: Path, batch: int, size: int) -> None:
        self.session = Session(path, threads=1)
        self.tokens = torch.full((batch,), 7)
        self.session.prefill(prompt(batch, 3 * size), chunk=256)

    def step(self) -> None:
        self.session.step(self.tokens)


def write_pair(folder: Path, llama: Any, **options: Any) -> None:
    prefill = export_decoder(llama, names="genai", **options)
    write_package(folder, prefill, decode=export_step(llama, **options))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--windows", type=int, nargs="+", default=[508, 1020])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    llama = model()
    batch, rows = arguments.batch, []
    print(f"{SHAPE}, batch {batch}")
    print(f"ONNX Runtime {ort.__version__}, torch {torch.__version__}, {platform.machine()}, one thread")
    print(f"{'C':>6} {'graph':>12} {'ms':>8} {'against growing C':>18} {'cache':>10} {'memory a step':>14}")
    with tempfile.TemporaryDirectory() as name:
        growing = Path(name) / "growing"
        write_pair(growing, llama, cache="growing")
        for window in arguments.windows:
            size = arguments.sinks + window
            options: dict[str, Any] = {"cache": "streaming", "sinks": arguments.sinks, "window": window}
            pair = Path(name) / f"streaming_{size}"
            write_pair(pair, llama, **options)
            runners: dict[str, Any] = {
                "any": Streaming(pair / PREFILL, batch, size),
                "one": Streaming(pair, batch, size),
            }
            for multiple in MULTIPLES:
                # So that over the steps the mean length is the one that it is named after.
                runners[f"growing {multiple} C"] = Bound(growing, batch, multiple * size - arguments.steps // 2, None)
            times = {graph: statistics.median(t) for graph, t in measure(runners, arguments.steps).items()}
            for graph, seconds in times.items():
                ratio = seconds / times["growing 1 C"]
                session = runners[graph].session
                kept = sum(value.numpy().nbytes for value in session._cache.values())
                growth = memory_of(runners[graph].step, arguments.steps) / arguments.steps
                rows.append({"C": size, "graph": graph, "seconds": seconds, "ratio": ratio, "bytes": kept})
                shown = f"{seconds * 1e3:>8.2f} {ratio:>17.2f}× {kept / 1e6:>7.2f} MB {growth / 1e3:>11.1f} kB"
                print(f"{size:>6} {graph:>12} {shown}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"shape": SHAPE, "batch": batch, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
