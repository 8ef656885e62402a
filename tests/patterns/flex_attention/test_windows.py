"""Windows as attributes of Attention, on request at opset 25: which bounds are windows, and that they mean the same.

ONNX's reference evaluator runs the exported model; ONNX Runtime's CPU provider has no kernel of that opset.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
import torch._dynamo
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.export import Dim
from torch.nn.attention.flex_attention import flex_attention

import fxfuse
import fxfuse.onnx
from fxfuse.errors import FxfuseError

INF = float("inf")
FREE = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
WINDOW = ("is_causal", "left_window_size", "right_window_size")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


class Seen(nn.Module):
    """Attention to the keys that the condition lets through, heads grouped."""

    def __init__(self, condition):
        super().__init__()
        self.condition = condition

    def forward(self, q, k, v):
        def mod(s, b, h, i, j):
            return torch.where(self.condition(i, j, h), s, -INF)

        return flex_attention(q, k, v, score_mod=mod, enable_gqa=True)


class All(nn.Module):
    """Every case in one program: exporting them one by one would take minutes."""

    def __init__(self, conditions):
        super().__init__()
        self.models = nn.ModuleList(map(Seen, conditions))

    def forward(self, q, k, v):
        return tuple(model(q, k, v) for model in self.models)


# The condition; is_causal, left and right; is there a mask beside?
CASES = {
    "i - j <= 3": (lambda i, j, h: i - j <= 3, (0, 3, -1), False),
    "i - j < 3": (lambda i, j, h: i - j < 3, (0, 2, -1), False),
    "j > i - 3": (lambda i, j, h: j > i - 3, (0, 2, -1), False),
    "not far behind": (lambda i, j, h: ~(i - j > 3), (0, 3, -1), False),
    "j + 3 >= i": (lambda i, j, h: j + 3 >= i, (0, 3, -1), False),
    "j - i <= 2": (lambda i, j, h: j - i <= 2, (0, -1, 2), False),
    "j <= i + 2": (lambda i, j, h: j <= i + 2, (0, -1, 2), False),
    "both ways": (lambda i, j, h: (i - j <= 3) & (j - i < 2), (0, 3, 1), False),
    "causal": (lambda i, j, h: (i >= j) & (i - j <= 3), (1, 3, -1), False),
    "its own position alone": (lambda i, j, h: (i <= j) & (j <= i), (1, 0, -1), False),
    "two left bounds": (lambda i, j, h: (i - j <= 3) & (i - j <= 5), (0, 3, -1), False),
    "longer than any": (lambda i, j, h: i - j <= 100, (0, 100, -1), False),
    "and a mask": (lambda i, j, h: (i - j <= 3) & (i != 4), (0, 3, -1), True),
    # No windows: they begin beside the query's own position, or are no bounds of a difference.
    "strictly before": (lambda i, j, h: i - j >= 1, (0, -1, -1), True),
    "strictly before, near": (lambda i, j, h: (i > j) & (i - j <= 3), (0, 3, -1), True),
    "strictly after": (lambda i, j, h: j - i > 2, (0, -1, -1), True),
    "near or first": (lambda i, j, h: (i - j <= 3) | (j == 0), (0, -1, -1), True),
    "by head": (lambda i, j, h: i - j <= h, (0, -1, -1), True),
    "two steps": (lambda i, j, h: 2 * i - j <= 6, (0, -1, -1), True),
    "a sum": (lambda i, j, h: i + j <= 6, (0, -1, -1), True),
    "in floats": (lambda i, j, h: i - j <= 3.5, (0, -1, -1), True),
}


def qkv(batch, length, keys):
    draw = torch.Generator().manual_seed(length)
    return tuple(torch.randn(batch, h, n, 8, generator=draw) for h, n in ((4, length), (2, keys), (2, keys)))


def test_every_case():
    """At the exported sizes and at others, with more keys than queries and with fewer."""
    model, args = All([condition for condition, _, _ in CASES.values()]).eval(), qkv(2, 9, 11)
    program = fxfuse.fuse(_captured(model, args), opset=25, windows="attributes")
    onnx_program = fxfuse.onnx.export(program, opset_version=25)
    proto = onnx_program.model_proto
    onnx.checker.check_model(proto, full_check=True)
    made = {output: node for node in proto.graph.node for output in node.output}
    for (name, (_, expected, masked)), output in zip(CASES.items(), proto.graph.output, strict=True):
        node = made[output.name]
        while node.op_type == "Identity":  # equal ones are one
            node = made[node.input[0]]
        assert node.op_type == "Attention", name
        found = {a.name: a.i for a in node.attribute}
        assert tuple(found.get(n, 0 if n == "is_causal" else -1) for n in WINDOW) == expected, name
        assert (len(node.input) > 3) == masked, name
    evaluator = ReferenceEvaluator(proto)
    fused = program.module()
    for inputs in (args, qkv(3, 14, 12)):
        feeds = {i.name: t.numpy() for i, t in zip(proto.graph.input, inputs, strict=True)}
        with torch.no_grad():
            results = zip(CASES, evaluator.run(None, feeds), fused(*inputs), model(*inputs), strict=True)
        for name, in_onnx, in_torch, eager in results:
            np.testing.assert_allclose(in_onnx, eager.numpy(), rtol=1e-5, atol=2e-6, err_msg=name)
            np.testing.assert_allclose(in_torch.numpy(), eager.numpy(), rtol=1e-5, atol=2e-6, err_msg=name)


def _captured(model, args):
    with fxfuse.flex_capture(), torch.no_grad():
        return torch.export.export(model, args, dynamic_shapes=(FREE,) * 3)


def test_only_on_request_and_only_where_they_exist():
    model, args = Seen(CASES["causal"][0]).eval(), qkv(2, 9, 9)
    program = _captured(model, args)
    (entry,) = fxfuse.report(fxfuse.fuse(program, opset=25)).fused("Attention")
    assert "boolean mask" in entry.parameters and "left_window_size" not in entry.parameters
    (entry,) = fxfuse.report(fxfuse.fuse(program, opset=25, windows="attributes")).fused("Attention")
    assert entry.parameters["left_window_size"] == 3 and "boolean mask" not in entry.parameters
    for opset in (23, 24):
        with pytest.raises(FxfuseError, match="from opset 25 on") as caught:
            fxfuse.fuse(program, opset=opset, windows="attributes")
        assert caught.value.where == "windows"
        with pytest.raises(FxfuseError, match="from opset 25 on"):
            fxfuse.onnx.export(program, opset_version=opset, windows="attributes")
        with pytest.raises(FxfuseError, match="from opset 25 on"):
            fxfuse.prepass(model, opset=opset, windows="attributes")
    fused = fxfuse.fuse(program, opset=25, windows="attributes")
    with pytest.raises(Exception) as failed:  # torch.onnx wraps what a translation raises
        fxfuse.onnx.export(fused, opset_version=24)
    causes, error = [], failed.value
    while error is not None:
        causes.append(error)
        error = error.__cause__
    assert any(isinstance(e, FxfuseError) and "windows from opset 25 on" in str(e) for e in causes)


def test_gradients_and_the_way_back():
    model, args = Seen(CASES["both ways"][0]).eval(), qkv(2, 9, 9)
    fused = fxfuse.fuse(_captured(model, args), opset=25, windows="attributes")
    plain = fxfuse.unfuse(fused)
    grads = []
    for program in (fused, plain):
        q, k, v = (t.clone().requires_grad_() for t in args)
        program.module()(q, k, v).square().sum().backward()
        grads.append([t.grad for t in (q, k, v)])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
