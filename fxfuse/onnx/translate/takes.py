"""What operators take, by ONNX's definition and in ONNX Runtime: what each says of itself, and checks against it."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

import onnx_ir as ir
import torch

from fxfuse.errors import FxfuseError
from fxfuse.ops.registry import OPS, Takes

TYPES = {
    "float16": (ir.DataType.FLOAT16, torch.float16),
    "bfloat16": (ir.DataType.BFLOAT16, torch.bfloat16),
    "float32": (ir.DataType.FLOAT, torch.float32),
    "float64": (ir.DataType.DOUBLE, torch.float64),
}
"""The names of types in `Takes`."""


def operators() -> dict[str, Takes]:
    """What each ONNX operator takes, by its name."""
    return {op.onnx_name: op.takes for op in OPS.values() if op.takes}


@cache
def bfloat16_kernels() -> frozenset[str]:
    """The ONNX operators that ONNX Runtime's CPU provider (1.32) computes in bfloat16."""
    text = resources.files("fxfuse.onnx.translate").joinpath("takes.json").read_text(encoding="utf-8")
    return frozenset(json.loads(text)["onnxruntime_cpu_bfloat16"])


def untaken(operator: str, dtype: torch.dtype) -> str | None:
    """Why ONNX's operator cannot compute in this floating-point type what fxfuse's does; None where it can."""
    entry = operators().get(operator, Takes())
    taken = entry.get("types", list(TYPES))
    exact = entry.get("exact", list(TYPES))
    if not dtype.is_floating_point:
        return None
    name = next((n for n, (_, torch_type) in TYPES.items() if torch_type == dtype), str(dtype))
    if name not in taken:
        return f"{operator} is defined for {', '.join(taken)}, not for {name}"
    return None if name in exact else f"{operator} is exact in {', '.join(exact)}, not in {name}"


def check_taken(model: ir.Model) -> None:
    """Check that all inputs of operators that say what they take are of such types.

    Raises:
        FxfuseError: one is not; the message names the node.
    """
    names = {onnx: name for name, (onnx, _) in TYPES.items()}
    takes = operators()
    for node in model.graph.all_nodes():
        entry = takes.get(node.op_type) if node.domain == "" else None
        if entry is None:
            continue
        types = [names[v.dtype] for v in node.inputs if v is not None and v.dtype in names]
        wrong = [name for name in types if name not in entry["types"]]
        if wrong:
            raise FxfuseError(
                f"{node.op_type} is defined for {', '.join(entry['types'])}, not for {wrong[0]}",
                where=f"node {node.name}",
                hint="cast its inputs in the model",
            )
