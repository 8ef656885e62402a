"""The operators as PyTorch and ONNX have them: opcheck, gradients, ONNX's reference, decompositions."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

import fxfuse.ops
from tests.ops.samples import SAMPLES, Sample

COMPILED = (
    "rms_norm-transposed",
    "rotary_embedding-3d_ids_interleaved",
    "rotary_embedding-partial",
    "attention-past_bias",
    "attention-lengths_mask",
    "attention_with_present-past",
    "attention_with_qk-mode_2",
    "tensor_scatter-circular",
    "dequantize_linear-blocks",
    "quantize_linear-blocks",
)
"""The samples that also run through AOTAutograd, which takes a second or two each."""

every_sample = pytest.mark.parametrize("sample", SAMPLES, ids=str)


def leaves(sample: Sample) -> list[Tensor | None]:
    """Fresh arguments of the same layout, those of floating point asking for gradients."""
    args: list[Tensor | None] = []
    for arg in sample.args:
        if arg is not None and arg.is_floating_point():
            arg = (
                torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype).copy_(arg) if _dense(arg) else arg.clone()
            )
            arg.requires_grad_()
        args.append(arg)
    return args


def _dense(tensor: Tensor) -> bool:
    return 0 not in tensor.stride()


@every_sample
def test_opcheck(sample: Sample) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(sample.op, leaves(sample), sample.kwargs, test_utils=checks)


@pytest.mark.parametrize("sample", [s for s in SAMPLES if str(s) in COMPILED], ids=str)
def test_opcheck_compiled_with_dynamic_shapes(sample: Sample) -> None:
    torch.library.opcheck(sample.op, leaves(sample), sample.kwargs, test_utils="test_aot_dispatch_dynamic")


HAVE_GRADIENTS = [s for s in SAMPLES if s.outputs()[0].is_floating_point()]
"""Integers have none."""


@pytest.mark.parametrize("sample", HAVE_GRADIENTS, ids=str)
def test_gradients(sample: Sample) -> None:
    sample = sample.cast(torch.float64)
    args = leaves(sample)
    given = [arg for arg in args if arg is not None and arg.requires_grad]

    def run(*floats: Tensor) -> tuple[Tensor, ...]:
        rest = iter(floats)
        outputs = sample.outputs(*(next(rest) if arg is not None and arg.requires_grad else arg for arg in args))
        # Masked scores are -inf and stay so; their gradient is nothing that a difference could measure.
        return tuple(out.masked_fill(out.isinf(), 0.0) for out in outputs)

    assert torch.autograd.gradcheck(run, given, fast_mode=True)


def test_second_gradients() -> None:
    for name in (
        "rms_norm-plain",
        "layer_norm-plain",
        "rotary_embedding-4d_ids",
        "attention-gqa",
        "tensor_scatter-linear",
    ):
        sample = next(sample for sample in SAMPLES if str(sample) == name).cast(torch.float64)
        given = [arg for arg in leaves(sample) if arg is not None and arg.requires_grad]
        rest = [arg for arg in sample.args if arg is not None and not arg.is_floating_point()]
        assert torch.autograd.gradgradcheck(lambda *floats: sample.outputs(*floats, *rest), given, fast_mode=True)  # noqa: B023


def onnx_reference(sample: Sample) -> list[np.ndarray]:
    """The same call in ONNX's own reference implementation."""
    op = fxfuse.ops.OPS[sample.op]
    names = [f"i{n}" if arg is not None else "" for n, arg in enumerate(sample.args)]
    outputs = [f"o{n}" for n in range(len(sample.outputs()))]
    node = onnx.helper.make_node(op.onnx_name, names, outputs, **sample.kwargs)
    blank = [onnx.ValueInfoProto(name=name) for name in names if name]
    graph = onnx.helper.make_graph([node], "call", blank, [onnx.ValueInfoProto(name=name) for name in outputs])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)])
    feeds = {name: numpy(arg) for name, arg in zip(names, sample.args, strict=True) if arg is not None}
    return ReferenceEvaluator(model).run(None, feeds)


def numpy(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


NOT_IN_REFERENCE = {
    "rms_norm-mixed": "the reference gives X's dtype, the specification scale's",
    "layer_norm-half_stash": "the reference knows float32 only",
    "rms_norm-half_stash": "the reference knows float32 only",
    "rms_norm-double_stash": "the reference knows float32 only",
}


@pytest.mark.parametrize("sample", [s for s in SAMPLES if str(s) not in NOT_IN_REFERENCE], ids=str)
def test_agrees_with_onnx_reference(sample: Sample) -> None:
    for ours, theirs in zip(sample.outputs(), onnx_reference(sample), strict=True):
        assert numpy(ours).dtype == theirs.dtype
        np.testing.assert_allclose(numpy(ours), theirs, rtol=1e-5, atol=1e-6)


class Calls(torch.nn.Module):
    """All the samples in one program: one by one, exporting them would take minutes."""

    def __init__(self, samples: list[Sample]) -> None:
        super().__init__()
        self.samples = samples

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        rest = iter(given)
        outputs: list[Tensor] = []
        for sample in self.samples:
            outputs += sample.outputs(*(None if arg is None else next(rest) for arg in sample.args))
        return tuple(outputs)


def tensors(samples: list[Sample]) -> tuple[Tensor, ...]:
    return tuple(arg for sample in samples for arg in sample.args if arg is not None)


def check_decomposed(samples: list[Sample], dynamic_shapes: Any, inputs: list[tuple[Tensor, ...]]) -> None:
    calls = Calls(samples)
    program = torch.export.export(calls, tensors(samples), dynamic_shapes=dynamic_shapes)
    plain = program.run_decompositions(fxfuse.ops.decompositions())
    left = [node for node in plain.graph.nodes if node.target in fxfuse.ops.OPS]
    assert not left
    names = [str(sample) for sample in samples for _ in sample.outputs()]
    for given in inputs:
        for name, ours, theirs in zip(names, plain.module()(*given), calls(*given), strict=True):
            assert strides(ours) == strides(theirs), name
            torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def strides(tensor: Tensor) -> list[int]:
    """Those that mean something: a dimension of size 1 can have any."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def test_decompositions() -> None:
    check_decomposed(SAMPLES, None, [tensors(SAMPLES)])


def test_decompositions_with_another_batch() -> None:
    batched = [s for s in SAMPLES if all(arg is None or arg.shape[:1] == (2,) for arg in s.args)]
    assert {sample.op for sample in batched} >= set(fxfuse.ops.OPS) - {
        torch.ops.fxfuse.rms_norm.default,
        torch.ops.fxfuse.layer_norm.default,
    }
    given = tensors(batched)
    batch = torch.export.Dim("batch", min=1, max=64)
    more = tuple(torch.cat((arg, arg.flip(0)[:1])) for arg in given)
    check_decomposed(batched, (tuple({0: batch} for _ in given),), [given, more])
