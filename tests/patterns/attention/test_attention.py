"""Attention: what masks, biases, sinks and layouts of k and v may be spelled like."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

import fxfuse
import fxfuse.onnx
from fxfuse.parity.ort import OnnxRuntime
from tests.patterns import models
from tests.patterns.models import HEADS, KV, WIDTH, export

CASES: list[tuple[type[nn.Module], int, int]] = [
    (models.ScaledWithMask, 1, KV),
    (models.BiasPerBatchAndHead, 1, KV),
    (models.FilledByArithmetic, 1, KV),
    (models.FilledByTensor, 1, KV),
    (models.FilledInPlace, 1, KV),
    (models.Sinks, 1, KV),
    (models.MaskMadeOfValues, 1, KV),
    (models.ScaledValues, 1, KV),
    (models.KeysAreValues, 1, KV),
    (models.OneKeyHead, 1, 1),
    (models.HeadsInTurn, 1, HEADS),
    (models.HeadsInTurnWrittenOut, 1, HEADS),
    (models.SharedKeys, 2, KV),
]


def attentions(program: ExportedProgram) -> list[Node]:
    return [n for n in program.graph.nodes if n.target is torch.ops.fxfuse.attention.default]


@pytest.mark.parametrize(("model", "count", "kv_heads"), CASES, ids=[c[0].__name__ for c in CASES])
def test_is_one_attention_with_its_own_key_heads(model: type[nn.Module], count: int, kv_heads: int) -> None:
    torch.manual_seed(1)
    module = model()
    program = export(module, torch.randn(2, 6, WIDTH))
    fused = fxfuse.fuse(program)
    found = attentions(fused)
    assert len(found) == count, fxfuse.report(fused)
    for entry in fxfuse.report(fused).fused("Attention"):
        assert entry.parameters["kv_num_heads"] == kv_heads
    for shape in ((2, 6), (1, 3), (3, 9)):
        x = torch.randn(*shape, WIDTH)
        torch.testing.assert_close(fused.module()(x), module(x), rtol=1e-5, atol=1e-5)


CAUSAL = [models.ScaledWithMask, models.FilledByArithmetic, models.FilledByTensor, models.ScaledValues]


@pytest.mark.parametrize("model", CAUSAL)
def test_a_mask_that_is_causal_at_every_size_is_not_built(model: type[nn.Module]) -> None:
    (node,) = attentions(fxfuse.fuse(export(model(), torch.randn(2, 6, WIDTH))))
    assert node.kwargs.get("is_causal") == 1
    assert len(node.args) == 3 or node.args[3] is None


@pytest.mark.parametrize("model", [models.Sinks, models.BiasPerBatchAndHead, models.MaskMadeOfValues])
@pytest.mark.parametrize("opset", [23, 24])
def test_runs_in_onnx_runtime_at_another_shape(model: type[nn.Module], opset: int) -> None:
    module, x = model().eval(), torch.randn(2, 6, WIDTH)
    dims = ({0: "batch", 1: "sequence"},)
    program = fxfuse.onnx.export(module, (x,), dynamic_shapes=dims, opset_version=opset)
    assert [n.op_type for n in program.model.graph].count("Attention") == 1
    run = OnnxRuntime(program)
    for shape in ((2, 6), (1, 5), (3, 9)):
        x = torch.randn(*shape, WIDTH)
        (got,) = run(x)
        torch.testing.assert_close(got, module(x), rtol=1e-4, atol=1e-5)


class Window(models.FilledByArithmetic):
    """A triangle that is no longer causal beyond 32 keys: met at those sizes, it is not taken for causal."""

    def __init__(self) -> None:
        super().__init__()
        self.triangle = self.triangle.triu(-32)


class TwoFactors(models.Sinks):
    """Weights that do not sum to one for another reason than a sink."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        weights = (q @ self.repeat(k).transpose(-1, -2)).softmax(-1) * self.sinks.sigmoid().view(1, -1, 1, 1)
        return weights @ self.repeat(v)


class SharpenedPairs(models.MaskMadeOfValues):
    """A factor of each pair of a query and a key: neither q's nor k's."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[1], dtype=x.dtype)
        return (q @ self.repeat(k).transpose(-1, -2) * (position[:, None] * position).cos()).softmax(-1) @ self.repeat(
            v
        )


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (TwoFactors, "sum to one"),
        (SharpenedPairs, "varies over queries and keys"),
    ],
)
def test_what_is_no_attention_is_refused_with_the_reason(model: type[nn.Module], why: str) -> None:
    module = model()
    fused = fxfuse.fuse(export(module, torch.randn(2, 6, WIDTH)))
    assert not attentions(fused)
    assert why in str(fxfuse.report(fused))


class WindowOnBothSides(models.Attention):
    """A bias that is 0 throughout at small lengths: met beyond its window, it is not taken for none."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[1])
        near = (position[:, None] - position).abs() <= 24
        bias = torch.zeros(x.shape[1], x.shape[1]).masked_fill(~near, -torch.inf)
        return (q @ self.repeat(k).transpose(-1, -2) + bias).softmax(-1) @ self.repeat(v)


@pytest.mark.parametrize("model", [Window, WindowOnBothSides])
def test_a_window_is_met_beyond_its_width(model: type[nn.Module]) -> None:
    module = model()
    fused = fxfuse.fuse(export(module, torch.randn(2, 6, WIDTH)))
    assert not any(n.kwargs.get("is_causal") for n in attentions(fused))
    x = torch.randn(1, 60, WIDTH)
    torch.testing.assert_close(fused.module()(x), module(x), rtol=1e-5, atol=1e-5)
