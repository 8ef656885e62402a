"""What a decoding step costs: ``python -m tests.benchmarks.decode [--shape smollm2-135m --layers 4]``.

A Llama with grouped heads and random weights in three ways, on ONNX Runtime's CPU provider with one thread:

    plain     what torch.onnx.export makes of it with its DynamicCache, driven with numpy in and out of `run`
    growing   fxfuse's graph, whose cache grows
    static    fxfuse's graph, whose cache is written in place

each with the cache bound where it lies (I/O binding, what `fxfuse.runtime` does) and without (arrays in, arrays out).
All are measured in turn, step by step, in one process, by the thread's own clock, which stands still while others have
the processor; what is printed are medians, of times and of each step's ratio to plain's just before.

With one sequence every weight is read once a step and used once, so that a step takes at least as long as the memory
takes to give them. Two lines say how far a faster attention could lead: the ratio that would be reached if attention
took no time (the first of fxfuse's graphs with one token of context), and the one if nothing took time but to read
weights and cache once.
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

from fxfuse.decoder.export import export_decoder
from fxfuse.runtime import Session

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 4096,
        "max_position_embeddings": 4096,
    },
    # https://huggingface.co/HuggingFaceTB/SmolLM2-135M/blob/main/config.json
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}
CONTEXTS = (128, 1024, 2048)


def model(shape: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**shape)).eval()


def plain_export(llama: Any, path: Path) -> None:
    """`torch.onnx.export` of the same call with the same cache, at its own default opset.

    transformers' exporter prepares the cache and the shapes, and calls it; nothing is fused, by it or by us.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter

    from fxfuse.decoder import export as decoder
    from fxfuse.decoder.names import renamed

    stage, inputs = decoder._decode_stage(llama, False)
    program = OnnxExporter().export(stage, inputs, OnnxConfig(dynamic=True)).program
    for value in (*program.graph.inputs, *program.graph.outputs):
        value.name = renamed(value.name or "", "genai")
    decoder._name_axes(program)
    print(f"plain: opset {program.opset_imports['']}, {len(program.graph)} nodes")
    ir.save(program, path)


class Bound:
    """`fxfuse.runtime`: the cache is bound where it lies."""

    def __init__(self, path: Path, batch: int, context: int, max_length: int | None) -> None:
        self.session = Session(path, max_length=max_length, threads=1)
        self.session.prefill(prompt(batch, context), chunk=256)
        self.tokens = torch.full((batch,), 7)

    def step(self) -> None:
        self.session.step(self.tokens)


class Unbound:
    """`run` with arrays: every call takes the whole cache and gives the whole cache."""

    def __init__(self, path: Path, batch: int, context: int, max_length: int | None) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.cache = {
            i.name: np.zeros((batch, i.shape[1], max_length or 0, i.shape[3]), np.float32)
            for i in self.session.get_inputs()
            if i.name.startswith("past")
        }
        self.batch, self.length = batch, 0
        for part in prompt(batch, context).split(256, 1):
            self.feed(part.numpy())

    def feed(self, ids: np.ndarray) -> None:
        self.length += ids.shape[1]
        positions = np.tile(np.arange(self.length - ids.shape[1], self.length), (self.batch, 1))
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones((self.batch, self.length), np.int64),
            "position_ids": positions,
        }
        outputs = dict(zip(self.outputs, self.session.run(None, {**inputs, **self.cache}), strict=True))
        self.cache = {name: outputs[name.replace("past_key_values", "present")] for name in self.cache}

    def step(self) -> None:
        self.feed(np.full((self.batch, 1), 7))


def prompt(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 4096, (batch, length), generator=torch.Generator().manual_seed(0))


def measure(runners: dict[str, Any], steps: int) -> dict[str, list[float]]:
    """Seconds of each step of each, in turn."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for count in range(steps + 3):
        for name, runner in runners.items():
            start = time.thread_time()
            runner.step()
            if count >= 3:
                times[name].append(time.thread_time() - start)
    return times


def bandwidth() -> float:
    """Bytes a second that one thread reads from memory, at best."""
    numbers, best = np.ones(1 << 25, np.float32), float("inf")
    for _ in range(10):
        start = time.thread_time()
        numbers.sum()
        best = min(best, time.thread_time() - start)
    return numbers.nbytes / best


def bytes_read(path: Path, shape: dict[str, Any], batch: int, context: int) -> tuple[int, int]:
    """Of weights, which MatMul reads, and of the cache: what no step can do without."""
    constants = ir.load(path).graph.initializers.values()
    weights = sum(
        v.const_value.nbytes for v in constants if v.const_value and "MatMul" in {n.op_type for n in readers(v)}
    )
    a_token = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"] * 4
    return weights, batch * context * a_token


def readers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read it, as it is or transposed."""
    nodes = [use.node for use in value.uses()]
    return nodes + [reader for n in nodes if n.op_type == "Transpose" for reader in readers(n.outputs[0])]


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
    parser.add_argument("--shape", choices=[*SHAPES], default="small")
    parser.add_argument("--layers", type=int, help="so many of the shape's, and as large a share of its vocabulary")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--forms", nargs="+", default=["growing", "static"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape, batch = SHAPES[arguments.shape], arguments.batch
    if arguments.layers:
        words = shape["vocab_size"] * arguments.layers // shape["num_hidden_layers"]
        shape = {**shape, "num_hidden_layers": arguments.layers, "vocab_size": words}
    llama = model(shape)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        graphs = {"plain": Path(folder) / "plain.onnx"}
        plain_export(llama, graphs["plain"])
        for form in arguments.forms:
            graphs[form] = Path(folder) / f"{form}.onnx"
            ir.save(export_decoder(llama, names="genai", cache=form), graphs[form])
        print(f"{shape}, batch {batch}")
        print(f"ONNX Runtime {ort.__version__}, torch {torch.__version__}, {platform.machine()}, one thread")
        print(f"{'context':>8} {'graph':>9} {'cache':>8} {'ms':>8} {'against plain':>14} {'memory a step':>14}")
        for context in arguments.contexts:
            room = context + 3 * arguments.steps
            runners: dict[str, Any] = {}
            for form, path in graphs.items():
                length = room if form == "static" else None
                runners[f"{form} unbound"] = Unbound(path, batch, context, length)
                runners[f"{form} bound"] = Bound(path, batch, context, length)
            form = arguments.forms[0]
            runners["no attention"] = Unbound(graphs[form], batch, 1, room if form == "static" else None)
            times = measure(runners, arguments.steps)
            plain = times["plain unbound"]
            bare = statistics.median(np.divide(plain, times.pop("no attention")))
            for name, seconds in times.items():
                growth = memory_of(runners[name].step, arguments.steps) / arguments.steps
                form, cache = name.split()
                ratio, typical = statistics.median(np.divide(plain, seconds)), statistics.median(seconds)
                rows.append({"context": context, "graph": form, "cache": cache, "seconds": typical, "ratio": ratio})
                shown = f"{typical * 1e3:>8.2f} {ratio:>13.2f}× {growth / 1e3:>11.1f} kB"
                print(f"{context:>8} {form:>9} {cache:>8} {shown}")
            weights, cached = bytes_read(graphs["plain"], shape, batch, context)
            speed = bandwidth()
            least = (weights + cached) / speed
            print(f"{context:>8}  at most, if attention took no time: {bare:.2f}×")
            print(
                f"{context:>8}  at most, reading {weights / 1e6:.1f} MB of weights and {cached / 1e6:.1f} MB of cache "
                f"once at {speed / 1e9:.1f} GB/s, {least * 1e3:.2f} ms: {statistics.median(plain) / least:.2f}×"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({"shape": shape, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
