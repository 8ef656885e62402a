"""What becomes of the ONNX graph: nodes and operators that torch.onnx.export writes, and fxfuse.onnx.export.

    python -m tests.benchmarks.onnx_graph
    python -m tests.benchmarks.onnx_graph --models llama3 gemma2 --dtype float16

The models are small, with two layers; per layer the real ones have the same nodes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import warnings
from collections import Counter

import onnx_ir as ir
import torch

import fxfuse.onnx
from tests.torchtune.graphs import onnx_nodes
from tests.torchtune.models import CASES

OPERATORS = ("RMSNormalization", "RotaryEmbedding", "Attention", "Expand")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def counts(program: torch.onnx.ONNXProgram | None) -> Counter[str]:
    assert program is not None
    model: ir.Model = program.model
    return Counter(node.op_type for node in onnx_nodes(model))


def main() -> None:
    cases = {case.name: case for case in CASES if case.onnx}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[*cases], default=["llama3", "gemma2", "phi3", "qwen2"])
    parser.add_argument("--dtype", choices=[*DTYPES], default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # torch.onnx says of every operator of torchvision that it skips it
    header = ["model", "nodes", "kinds of nodes", *OPERATORS]
    print("| " + " | ".join(header) + " |", "|" + " ---: |" * len(header), sep="\n", flush=True)
    for name in options.models:
        case, dtype = cases[name], DTYPES[options.dtype]
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = case.export(case.model(dtype), case.inputs(dtype=dtype))
            before = counts(torch.onnx.export(program, dynamo=True, opset_version=24, verbose=False))
            after = counts(fxfuse.onnx.export(program, opset_version=24))
        cells = [f"{before.total()} → {after.total()}", f"{len(before)} → {len(after)}"]
        cells += [f"{before[operator]} → {after[operator]}" for operator in OPERATORS]
        print("| " + " | ".join([name, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
