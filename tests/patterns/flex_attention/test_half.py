"""float16 and bfloat16: what flex_attention computes in float32 is computed in float32, in ONNX too."""

from __future__ import annotations

import onnx
import pytest
import torch
import torch._dynamo

import fxfuse
import fxfuse.onnx
from fxfuse.patterns.flex_attention.reading import ULP
from tests.patterns.flex_attention.checks import inputs, program
from tests.patterns.flex_attention.idioms import IDIOMS
from tests.torchtune.graphs import upcast

ort = pytest.importorskip("onnxruntime")
NotImplementedByRuntime = ort.capi.onnxruntime_pybind11_state.NotImplemented
TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
}
NAMES = {
    onnx.TensorProto.FLOAT: "tensor(float)",
    onnx.TensorProto.FLOAT16: "tensor(float16)",
    onnx.TensorProto.BFLOAT16: "tensor(bfloat16)",
}
BY_NAME = {entry.define.__name__: entry for entry in IDIOMS}
IDIOMS_AT = {
    "causal": 23,
    "sliding_window": 24,
    "documents": 23,
    "alibi_causal": 24,
    "forgetting": 23,
    "softcap_window": 24,
    "log_scale": 23,
    "sinks_lse": 24,
    "clamped": 23,
}
"""One of a kind, and the opset for the sample that is run by default."""
HALF, BRAIN = torch.float16, torch.bfloat16
SAMPLE = [
    ("causal", HALF),
    ("documents", BRAIN),
    ("alibi_causal", HALF),
    ("softcap_window", HALF),
    ("softcap_window", BRAIN),
    ("sinks_lse", HALF),
    ("clamped", HALF),
]
RUNS_IN_BRAIN = ("softcap_window", "log_scale")
"""ONNX Runtime's CPU provider casts bfloat16, and has neither its Attention nor its Expand, Mul and MatMul."""


def cases():
    for name, own in IDIOMS_AT.items():
        for dtype in (HALF, BRAIN):
            for opset in (23, 24):
                marks = () if own == opset and (name, dtype) in SAMPLE else pytest.mark.slow
                yield pytest.param(name, dtype, opset, marks=marks, id=f"{name}-{str(dtype)[6:]}-{opset}")


def load(model):
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(model, args, runs):
    """In ONNX Runtime, by references to memory: numpy has no bfloat16. What it cannot load, in float32."""
    if not runs:
        with pytest.raises(NotImplementedByRuntime, match="Could not find an implementation"):
            load(model)
        onnx.checker.check_model(model, full_check=True)
        model, args = upcast(model), [a.float() for a in args]
    session = load(model)
    binding = session.io_binding()
    for given, t in zip(session.get_inputs(), args, strict=True):
        t = t.contiguous()
        binding.bind_input(given.name, "cpu", 0, TYPES[t.dtype], tuple(t.shape), t.data_ptr())
    (output,) = session.get_outputs()
    dtype = next(d for d, number in TYPES.items() if NAMES[number] == output.type)
    result = torch.empty_like(args[0], dtype=dtype)
    binding.bind_output(output.name, "cpu", 0, TYPES[dtype], tuple(result.shape), result.data_ptr())
    session.run_with_iobinding(binding)
    return result


def units(result, exact, dtype):
    """The largest error, in units of the last place; of small values, of a usual one's."""
    unit = torch.finfo(dtype).eps * exact.abs().clamp(min=float(exact.square().mean().sqrt()))
    return float(((result.double() - exact).abs() / unit).max())


@pytest.mark.parametrize(("name", "dtype", "opset"), cases())
def test_rounds_as_flex_attention_does(name, dtype, opset):
    """At another batch and length than the exported ones; no further from float64 than the bound of the proof."""
    torch._dynamo.reset()
    entry = BY_NAME[name]
    fused = fxfuse.fuse(program(entry, dynamic=True, dtype=dtype), opset=opset)
    assert [e.status for e in fxfuse.report(fused)] == ["fused" if entry.whole else "decomposed"]
    model = fxfuse.onnx.export(fused, opset_version=opset).model_proto
    args = tuple(2 * t for t in inputs(entry, 4, 29, dtype))
    with torch.no_grad():
        exact = entry.model().to(dtype).double()(*(a.double() for a in args))
        expected, actual = entry.model().to(dtype)(*args), fused.module()(*args)
    runs = dtype == HALF or name in RUNS_IN_BRAIN
    ran = run(model, args, runs)
    assert actual.dtype == expected.dtype and (ran.dtype == expected.dtype or not runs)
    theirs = units(expected, exact, dtype)
    for result in (actual, ran):
        assert units(result, exact, dtype) <= 2 * theirs + ULP
