"""Packed weights, taken apart by shifts and masks: the integers that they hold are written in four bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxfuse
import fxfuse.onnx
from tests.patterns.dequantize_linear.words import GPTQ, LAYOUTS, G, K, N, Signed, Words


def fused(model: nn.Module) -> list[torch.fx.Node]:
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(2))
    result = fxfuse.fuse(torch.export.export(model.eval(), (x,)), frozen=True)
    torch.testing.assert_close(result.module()(x), model(x))
    assert [e.parameters["stored"] for e in fxfuse.report(result).fused()] in (["UINT4"], ["INT4"])
    return [n for n in result.graph.nodes if n.target is torch.ops.fxfuse.dequantize_linear.default]


@pytest.mark.parametrize("kind", [Words, Signed])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_to_a_byte(layout: str, kind: type[Words]) -> None:
    (node,) = fused(kind(*LAYOUTS[layout]))
    assert node.kwargs["block_size"] == G
    assert (len(node.args) > 2 and node.args[2] is not None) == (kind is Words)


def test_gptq() -> None:
    (node,) = fused(GPTQ())
    assert (node.kwargs["axis"], node.kwargs["block_size"]) == (0, G)
    assert node.args[2].meta["val"].dtype == torch.uint8


def test_a_bit_that_is_lost() -> None:
    """Masked by 7: eight numbers, and the proof sees every bit of the words."""
    pack, _ = LAYOUTS["the lower half first"]
    model = Words(pack, lambda w: torch.stack([w & 7, w >> 4], -1).view(N, K))
    fused(model)


class Together(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([*(Words(*layout) for layout in LAYOUTS.values()), GPTQ()])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def test_exported(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Together().eval()
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(2))
    written = fxfuse.onnx.export(model, (x,), tmp_path / "m.onnx", dynamic_shapes=({0: torch.export.Dim.AUTO},)).model
    nodes = [n for n in written.graph if n.op_type == "DequantizeLinear"]
    assert [n.inputs[0].dtype.name for n in nodes] == ["UINT4"] * 4
    for node, layer in zip(nodes, model.layers, strict=False):
        if isinstance(layer, Words):
            assert np.array_equal(node.inputs[0].const_value.numpy().astype(np.uint8), layer.integers.numpy().T)
    assert not [n for n in written.graph if n.op_type.startswith(("Bit", "Mod"))]
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # activations stay float32
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", options, providers=["CPUExecutionProvider"])
    for given in (x, torch.randn(7, K, generator=torch.Generator().manual_seed(3))):
        for ours, theirs in zip(session.run(None, {"x": given.numpy()}), model(given), strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-5, atol=1e-4)
