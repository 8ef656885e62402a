"""The two halves of FlexAttention: as operators, against flex_attention, and against ONNX's reference."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch.nn.attention.flex_attention import flex_attention

import fxfuse
from fxfuse.errors import FxfuseError
from fxfuse.ops.registry import PARTS

ops = torch.ops.fxfuse
SHAPES = {"plain": (2, 4, 4, 5, 7, 8, 8), "grouped": (2, 4, 2, 5, 7, 8, 6), "one of each": (1, 1, 1, 1, 1, 8, 8)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def given(shape, dtype=torch.float32, seed=0):
    B, Hq, Hkv, S, T, D, Dv = shape
    draw = torch.Generator().manual_seed(seed)
    sizes = ((B, Hq, S, D), (B, Hkv, T, D), (B, Hkv, T, Dv))
    return tuple(torch.randn(size, generator=draw, dtype=torch.float64).to(dtype) for size in sizes)


def attend(q, k, v, scale=0.3):
    """Causal, its scores squared; the first query sees nothing."""
    scores, b, h, i, j = ops.flex_scores(q, k, scale=scale)
    return ops.flex_output(torch.where((i >= j) & (i > 0), scores * scores + 0.1 * h - b, -torch.inf), v)


def eager(q, k, v, scale=0.3):
    def mod(s, b, h, i, j):
        return torch.where((i >= j) & (i > 0), s * s + 0.1 * h - b, -torch.inf)

    return flex_attention(q, k, v, score_mod=mod, scale=scale, enable_gqa=True)


@every_shape
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_together_they_are_flex_attention(shape, dtype):
    q, k, v = given(shape, dtype)
    torch.testing.assert_close(attend(q, k, v), eager(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_accurate(dtype):
    q, k, v = given(SHAPES["grouped"], dtype)
    exact = eager(q.double(), k.double(), v.double())
    ours, theirs = attend(q, k, v), eager(q, k, v)
    assert ours.dtype == dtype
    assert (ours - exact).abs().max() <= 1.5 * (theirs - exact).abs().max() + torch.finfo(dtype).eps


@every_shape
def test_opcheck_and_gradients(shape):
    q, k, v = (t.requires_grad_() for t in given(shape, torch.float64))
    scores = torch.where(torch.rand(q.shape[:3] + k.shape[2:3]) > 0.3, 1.0, -torch.inf).double().requires_grad_()
    for operator, args, kwargs in (
        (ops.flex_scores.default, (q, k), {"scale": 0.3}),
        (ops.flex_output.default, (scores, v), {}),
    ):
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(operator, args, kwargs, test_utils=checks)
    assert torch.autograd.gradcheck(attend, (q, k, v), fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, (q, k, v), fast_mode=True)


@pytest.mark.slow
def test_opcheck_compiled_with_dynamic_shapes():
    q, k, v = (t.requires_grad_() for t in given(SHAPES["grouped"], torch.float64))
    torch.library.opcheck(ops.flex_scores.default, (q, k), {"scale": 0.3}, test_utils="test_aot_dispatch_dynamic")
    scores = (q @ k.repeat(1, 2, 1, 1).mT).detach().requires_grad_()
    torch.library.opcheck(ops.flex_output.default, (scores, v), test_utils="test_aot_dispatch_dynamic")


def test_decompositions_for_any_size():
    shape = SHAPES["grouped"]

    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v)

    free = tuple({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC} for _ in range(3))
    program = torch.export.export(Model(), given((3, *shape[1:3], 5, 6, *shape[5:])), dynamic_shapes=free)
    assert fxfuse.ops.holds_fused(program)
    plain = program.run_decompositions(fxfuse.ops.decompositions())
    assert not any(node.target in PARTS for node in plain.graph.nodes)
    inputs = given((2, *shape[1:3], 7, 9, *shape[5:]))
    for module in (program.module(), plain.module()):
        out = module(*inputs)
        torch.testing.assert_close(out, eager(*inputs))
        assert out.stride() == attend(*inputs).stride()


@every_shape
def test_agrees_with_onnx_reference(shape):
    """Without a mod, which the reference evaluator cannot give what it captures."""
    q, k, v = given(shape)
    node = onnx.helper.make_node("FlexAttention", ["q", "k", "v"], ["y"], domain="ai.onnx.preview", scale=0.3)
    values = [onnx.ValueInfoProto(name=name) for name in "qkvy"]
    graph = onnx.helper.make_graph([node], "call", values[:3], values[3:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("ai.onnx.preview", 1)])
    (theirs,) = ReferenceEvaluator(model).run(None, {"q": q.numpy(), "k": k.numpy(), "v": v.numpy()})
    scores, *_ = ops.flex_scores(q, k, scale=0.3)
    np.testing.assert_allclose(ops.flex_output(scores, v).numpy(), theirs, rtol=1e-5, atol=1e-6)


def test_no_keys_give_nothing():
    q, k, v = given((2, 4, 2, 3, 0, 8, 8))
    assert (attend(q, k, v) == 0).all()


@pytest.mark.parametrize(
    ("call", "where"),
    [
        (lambda q, k, v: ops.flex_scores(q, k, scale=-1.0), "scale"),
        (lambda q, k, v: ops.flex_scores(q, k, scale=float("nan")), "scale"),
        (lambda q, k, v: ops.flex_scores(q, k.half(), scale=1.0), "K"),
        (lambda q, k, v: ops.flex_scores(q[0], k, scale=1.0), "Q"),
        (lambda q, k, v: ops.flex_scores(q[:, :3], k, scale=1.0), "K"),
        (lambda q, k, v: ops.flex_scores(q, k[:1], scale=1.0), "K"),
        (lambda q, k, v: ops.flex_output(q @ k.repeat(1, 2, 1, 1).mT, v[:, :, 1:]), "V"),
        (lambda q, k, v: ops.flex_output((q @ k.repeat(1, 2, 1, 1).mT).half(), v), "scores"),
        (lambda q, k, v: ops.flex_output((q @ k.repeat(1, 2, 1, 1).mT)[:, :3], v), "V"),
        (lambda q, k, v: ops.flex_output(q[0], v), "V"),
    ],
)
def test_what_does_not_fit_is_named(call, where):
    with pytest.raises(FxfuseError) as caught:
        call(*given(SHAPES["grouped"]))
    assert caught.value.where == where
