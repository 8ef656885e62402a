"""An idiom exported, fused, and compared with eager flex_attention in PyTorch and in ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch.export import Dim

import fxfuse
import fxfuse.onnx
from tests.patterns.flex_attention.idioms import HEADS, SIZE, Entry

SHAPES = {"exported": (2, 16), "longer": (4, 29)}


def inputs(entry: Entry, batch: int, length: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(batch * 100 + length)
    mods = entry.mods
    shapes = ((HEADS, SIZE), (mods.kv_heads, SIZE), (mods.kv_heads, mods.v_size))
    return tuple(torch.randn(batch, h, length, d, generator=draw).to(dtype) * 1.5 for h, d in shapes)


def program(entry: Entry, *, dynamic: bool, dtype: torch.dtype = torch.float32) -> torch.export.ExportedProgram:
    free = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    args = inputs(entry, *SHAPES["exported"], dtype)
    with fxfuse.flex_capture(), torch.no_grad():
        return torch.export.export(entry.model().to(dtype), args, dynamic_shapes=(free,) * 3 if dynamic else None)


@dataclass(frozen=True)
class Outcome:
    whole: bool
    encoding: str
    """What was used of Attention, or why it is none."""
    error: float
    nodes: int
    """In the ONNX graph."""


def encoding(report: fxfuse.fusion.Report) -> str:
    first = next(e for e in report if e.operator == "Attention")
    if first.status != "fused":
        return first.reason or ""
    parts = dict(first.parameters)
    said = ["is_causal"] if parts.pop("is_causal") else []
    if parts.pop("softcap"):
        said.append(f"softcap={first.parameters['softcap']:g}")
    scale = parts.pop("scale")
    if abs(scale - SIZE**-0.5) > 1e-6:
        said.append(f"scale={scale:.4g}")
    return ", ".join(said + [f"{name} {value}" for name, value in parts.items()]) or "no attribute"


def check(entry: Entry, *, dynamic: bool, opset: int, runtime: bool = True) -> Outcome:
    """Raises AssertionError where a result is not eager's."""
    captured = program(entry, dynamic=dynamic)
    fused = fxfuse.fuse(captured, opset=opset, frozen=True)
    report = fxfuse.report(fused)
    model = entry.model()
    shapes = SHAPES if dynamic else {"exported": SHAPES["exported"]}
    error = 0.0
    session, nodes = None, 0
    if runtime:
        import onnxruntime

        onnx = fxfuse.onnx.export(captured, opset_version=opset)
        nodes = sum(1 for _ in onnx.model.graph)
        count = Counter(n.op_type for n in onnx.model.graph)
        assert count["Attention"] == report.counts.get("Attention", 0)
        session = onnxruntime.InferenceSession(onnx.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, length in shapes.values():
        given = inputs(entry, batch, length)
        with torch.no_grad():
            expected = model(*given)
            results = [fused.module()(*given)]
        expected = expected if isinstance(expected, tuple) else (expected,)
        results = [r if isinstance(r, tuple) else (r,) for r in results]
        if session is not None:
            names = [i.name for i in session.get_inputs()]
            ran = session.run(None, {n: t.numpy() for n, t in zip(names, given, strict=True)})
            results.append(tuple(map(torch.from_numpy, ran)))
        for result in results:
            for x, y in zip(result, expected, strict=True):
                assert x.shape == y.shape and x.dtype == y.dtype
                away = (x - y).abs()
                away[x == y] = 0.0  # -inf of a row that sees nothing
                error = max(error, float(away.max()))
    whole = len(report.fused("Attention")) == 1
    return Outcome(whole, encoding(report), error, nodes)
