"""What a decoding step costs: ``python -m tests.benchmarks.decode``.

One model, a Llama with grouped heads, in three ways, on ONNX Runtime's CPU provider with one thread:

    plain     what torch.onnx.export makes of it with its DynamicCache, driven with numpy in and out of `run`
    growing   fxfuse's graph, whose cache grows
    static    fxfuse's graph, whose cache is written in place

each with the cache bound where it lies (I/O binding, what `fxfuse.runtime` does) and without (arrays in, arrays out).
All are measured in turn, step by step, in one process; what is printed are medians and their ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from fxfuse.onnx.decoder import export_decoder
from fxfuse.runtime import Session

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
}
CONTEXTS = (128, 1024, 2048)


def model() -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).eval()


def plain_export(llama: Any, path: Path) -> None:
    """`torch.onnx.export` of the same call with the same cache, at its own default opset.

    transformers' exporter prepares the cache and the shapes, and calls it; nothing is fused, by it or by us.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter

    from fxfuse.onnx import decoder

    stage, inputs = decoder._decode_stage(llama, False)
    program = OnnxExporter().export(stage, inputs, OnnxConfig(dynamic=True)).program
    for value in (*program.graph.inputs, *program.graph.outputs):
        value.name = decoder._renamed(value.name or "", "genai")
    decoder._name_axes(program)
    print(f"plain: opset {program.opset_imports['']}, {len(program.graph)} nodes")
    ir.save(program, path)


class Bound:
    """`fxfuse.runtime`: the cache is bound where it lies."""

    def __init__(self, path: Path, context: int, max_length: int | None) -> None:
        self.session = Session(path, max_length=max_length, threads=1)
        self.session.prefill(prompt(context), chunk=256)
        self.length = context

    def step(self) -> None:
        self.session.step(torch.tensor([7]))


class Unbound:
    """`run` with arrays: every call takes the whole cache and gives the whole cache."""

    def __init__(self, path: Path, context: int, max_length: int | None) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.cache = {
            i.name: np.zeros((1, i.shape[1], max_length or 0, i.shape[3]), np.float32)
            for i in self.session.get_inputs()
            if i.name.startswith("past")
        }
        self.length = 0
        for part in prompt(context).split(256, 1):
            self.feed(part.numpy())

    def feed(self, ids: np.ndarray) -> None:
        self.length += ids.shape[1]
        positions = np.arange(self.length - ids.shape[1], self.length)[None]
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones((1, self.length), np.int64),
            "position_ids": positions,
        }
        outputs = dict(zip(self.outputs, self.session.run(None, {**inputs, **self.cache}), strict=True))
        self.cache = {name: outputs[name.replace("past_key_values", "present")] for name in self.cache}

    def step(self) -> None:
        self.feed(np.array([[7]]))


def prompt(length: int) -> torch.Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0))


def measure(runners: dict[str, Any], steps: int) -> dict[str, list[float]]:
    """Seconds of each step of each, in turn."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for count in range(steps + 3):
        for name, runner in runners.items():
            start = time.perf_counter()
            runner.step()
            if count >= 3:
                times[name].append(time.perf_counter() - start)
    return times


def memory_of(step: Callable[[], None], steps: int) -> int:
    """Bytes by which the process's resident memory grows over `steps`."""
    step()
    before = resident()
    for _ in range(steps):
        step()
    return resident() - before


def resident() -> int:
    """Bytes that are resident now; Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--forms", nargs="+", default=["growing", "static"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    llama = model()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        graphs = {"plain": Path(folder) / "plain.onnx"}
        plain_export(llama, graphs["plain"])
        for form in arguments.forms:
            graphs[form] = Path(folder) / f"{form}.onnx"
            ir.save(export_decoder(llama, names="genai", cache=form), graphs[form])
        print(f"{SHAPE}\nONNX Runtime {ort.__version__}, torch {torch.__version__}, {platform.machine()}, one thread")
        print(f"{'context':>8} {'graph':>9} {'cache':>8} {'ms':>8} {'against plain':>14} {'memory a step':>14}")
        for context in arguments.contexts:
            room = context + 3 * arguments.steps
            runners: dict[str, Any] = {}
            for form, path in graphs.items():
                length = room if form == "static" else None
                runners[f"{form} unbound"] = Unbound(path, context, length)
                runners[f"{form} bound"] = Bound(path, context, length)
            times = {name: statistics.median(t) for name, t in measure(runners, arguments.steps).items()}
            for name, seconds in times.items():
                growth = memory_of(runners[name].step, arguments.steps) / arguments.steps
                form, cache = name.split()
                ratio = times["plain unbound"] / seconds
                rows.append({"context": context, "graph": form, "cache": cache, "seconds": seconds, "ratio": ratio})
                shown = f"{seconds * 1e3:>8.2f} {ratio:>13.2f}× {growth / 1e3:>11.1f} kB"
                print(f"{context:>8} {form:>9} {cache:>8} {shown}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"shape": SHAPE, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
