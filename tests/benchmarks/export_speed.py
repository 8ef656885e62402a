"""What fusing costs beside `torch.export.export`, and what it saves in `torch.onnx.export`.

    python -m tests.benchmarks.export_speed
    python -m tests.benchmarks.export_speed --layers 4 8 --repeat 5 --no-onnx
    python -m tests.benchmarks.export_speed --layers 32 --narrow

The model is of Llama-3-8B's shape with 4 to 128 layers, its weights on the meta device and its rotary caches real,
batch and sequence dynamic. Every figure is the median of the repetitions, in CPU seconds of one thread, so that other
programs on the machine disturb it little; whatever is compared is measured in turn in one process.

Weights without data cannot be folded, so torch.onnx.export runs with optimize=False, on both sides. With --narrow the
model has the same layers and the same graph but few and real weights, and torch.onnx.export does all that it does.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torchtune.models.llama3 import llama3
from torchtune.modules import RotaryPositionalEmbeddings

import fxfuse
from fxfuse.onnx.exporter import translate

T = TypeVar("T")

LLAMA3_8B: dict[str, Any] = {
    "vocab_size": 128_256,
    "num_heads": 32,
    "num_kv_heads": 8,
    "embed_dim": 4096,
    "intermediate_dim": 14_336,
    "max_seq_len": 8192,
}


NARROW = {**LLAMA3_8B, "vocab_size": 256, "embed_dim": 256, "intermediate_dim": 512, "max_seq_len": 256}


def model_of(layers: int, narrow: bool) -> nn.Module:
    with torch.device("cpu" if narrow else "meta"):
        return llama3(num_layers=layers, **(NARROW if narrow else LLAMA3_8B)).eval().requires_grad_(False)


def capture(model: nn.Module) -> ExportedProgram:
    tokens = torch.zeros(2, 64, dtype=torch.long, device=next(model.parameters()).device)
    return torch.export.export(model, (tokens,), dynamic_shapes={"tokens": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}})


def with_real_caches(program: ExportedProgram) -> ExportedProgram:
    """Fills in the rotary caches, which the proofs read; a capture of tensors on two devices would not trace."""
    head_dim = LLAMA3_8B["embed_dim"] // LLAMA3_8B["num_heads"]
    rope = RotaryPositionalEmbeddings(head_dim, LLAMA3_8B["max_seq_len"], base=500_000)
    for name, tensor in program.constants.items():
        if name.endswith(".cache") and tensor.is_meta:
            assert tensor.shape == rope.cache.shape
            program.constants[name] = rope.cache
    return program


def on_meta(program: ExportedProgram) -> ExportedProgram:
    """The program with all its data on the meta device, as torch.onnx can retrace it."""
    for tensors in (program.constants, program.state_dict):
        for name, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                tensors[name] = tensor.to("meta")
    return program


def plain_onnx(program: ExportedProgram, optimize: bool) -> torch.onnx.ONNXProgram | None:
    return torch.onnx.export(program, dynamo=True, opset_version=24, verbose=False, optimize=optimize)


def fused_onnx(program: ExportedProgram, optimize: bool) -> torch.onnx.ONNXProgram | None:
    return translate(program, opset=24, verbose=False, optimize=optimize)


@dataclass
class Stopwatch:
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def __call__(self, what: str, work: Callable[..., T], *args: Any) -> T:
        gc.collect()
        with quiet():
            start = time.process_time()
            result = work(*args)
            self.seconds.setdefault(what, []).append(time.process_time() - start)
        return result

    def median(self, what: str) -> float:
        return statistics.median(self.seconds[what])


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)  # torch.onnx says of every operator of torchvision that it skips it
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def measure(layers: int, repeat: int, onnx: bool, narrow: bool) -> Stopwatch:
    clock = Stopwatch()
    model = model_of(layers, narrow)
    for _ in range(repeat):
        program = with_real_caches(clock("export", capture, model))
        fused = clock("fuse", fxfuse.fuse, program)
        counts = fxfuse.report(fused).counts
        expected = {"RMSNormalization": 2 * layers + 1, "RotaryEmbedding": 2 * layers, "Attention": layers}
        assert counts == expected, counts
        if onnx:
            if not narrow:
                program, fused = on_meta(program), on_meta(fused)
            clock("onnx, unfused", plain_onnx, program, narrow)
            clock("onnx, fused", fused_onnx, fused, narrow)
    return clock


def row(layers: int, clock: Stopwatch, onnx: bool) -> list[str]:
    export, fuse = clock.median("export"), clock.median("fuse")
    cells = [str(layers), f"{export:.2f} s", f"{fuse:.2f} s", f"{fuse / export:.1%}", f"{1000 * fuse / layers:.0f} ms"]
    if not onnx:
        return [*cells, "", "", "", ""]
    unfused, fused = clock.median("onnx, unfused"), clock.median("onnx, fused")
    whole = (export + unfused) / (export + fuse + fused)
    return [*cells, f"{unfused:.1f} s", f"{fused:.1f} s", f"{unfused / fused:.2f}×", f"{whole:.2f}×"]


HEADER = [
    "layers",
    "`torch.export.export`",
    "`fxfuse.fuse`",
    "of the export",
    "per layer",
    "`torch.onnx.export`, unfused",
    "fused",
    "faster",
    "whole way faster",
]


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each figure (the median counts)")
    parser.add_argument("--onnx-layers", type=int, nargs="*", default=[32], help="sizes to write to ONNX as well")
    parser.add_argument("--no-onnx", action="store_true", help="measure capture and fusing only")
    parser.add_argument("--narrow", action="store_true", help="few and real weights; torch.onnx.export optimizes too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with_onnx = set() if options.no_onnx else set(options.onnx_layers)
    measure(1, 1, bool(with_onnx), options.narrow)  # imports, and whatever else is done once
    print(line(HEADER), line(["---:"] * len(HEADER)), sep="\n", flush=True)
    for layers in options.layers:
        clock = measure(layers, options.repeat, layers in with_onnx, options.narrow)
        print(line(row(layers, clock, layers in with_onnx)), flush=True)


if __name__ == "__main__":
    main()
