"""What a decoding step leaves in memory: ``python -m tests.benchmarks.memory``; Linux only.

A Llama that is small but for its cache: 64 KiB for every token of 8 sequences. Each form of cache decodes in a process
of its own, and what it has allocated is read every 64 steps, after 64 to warm up.

    growing   what came out goes in: a step needs its past and a longer present
    static    written in place; what attention reads is sliced off
    whole     written in place; attention reads the buffer itself (profile="cuda")
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx_ir as ir
import torch

from fxfuse.package.manifest import read_manifest
from fxfuse.runtime import Session

FORMS = ("growing", "static", "whole")
BATCH, HEADS, HEAD_SIZE, LAYERS = 8, 8, 64, 2
TOKEN = 2 * LAYERS * BATCH * HEADS * HEAD_SIZE * 4
"""Bytes of the cache for one more token of every sequence."""
EVERY = 64


def export(form: str, path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fxfuse.decoder.export import export_decoder

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": LAYERS, "vocab_size": 64}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_SIZE}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads, max_position_embeddings=8192)).eval()
    options = {"cache": "growing"} if form == "growing" else {"cache": "static"}
    if form == "whole":
        options["profile"] = "cuda"
    ir.save(export_decoder(model, names="genai", **options), path)  # type: ignore[arg-type]


def allocated() -> int:
    """Bytes of the process's data. Not what is resident: a buffer's pages are that once they were written to."""
    return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()


def is_static(path: Path) -> bool:
    return read_manifest(path)[1].cache.form == "static"


def decode(path: Path, steps: int) -> list[int]:
    """Bytes that are allocated after every 64th step of decoding, the first after 64."""
    session = Session(path, max_length=steps + 2 * EVERY if is_static(path) else None, threads=1)
    session.prefill(torch.ones(BATCH, 8, dtype=torch.int64))
    tokens = torch.ones(BATCH, dtype=torch.int64)
    found = []
    for step in range(1, steps + EVERY + 1):
        session.step(tokens)
        if step % EVERY == 0:
            found.append(allocated())
    return found


def measured(form: str, steps: int) -> list[int]:
    """`decode` of that form, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(form, path)
        command = [sys.executable, "-m", "tests.benchmarks.memory", "--child", str(path), "--steps", str(steps)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    numbers: list[int] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1024)
    parser.add_argument("--child", type=Path)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(decode(arguments.child, arguments.steps)))
        return
    print(f"a token is {TOKEN / 1024:.0f} KiB of cache; memory over {arguments.steps} steps")
    for form in FORMS:
        found = measured(form, arguments.steps)
        first, last, most = found[0] / 2**20, found[-1] / 2**20, max(found) / 2**20
        growth = (found[-1] - found[0]) / arguments.steps / 1024
        print(f"{form:>8}: {first:7.1f} → {last:7.1f} MiB, at most {most:7.1f} MiB; {growth:7.1f} KiB a step")


if __name__ == "__main__":
    main()
