"""What is fused lies in memory as the views behind it need."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxfuse
from fxfuse.parity.ort import onnxruntime_outputs


class Attends(nn.Module):
    """`nn.MultiheadAttention`: decomposed, its result is copied with time first, turned twice and viewed."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


class TurnedAndViewed(nn.Module):
    """Softmax attention whose result is copied with its positions outermost, and seen as rows of positions."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = (q @ k.transpose(-1, -2) * 0.25).softmax(-1) @ v
        y = y.permute(2, 0, 1, 3).clone(memory_format=torch.contiguous_format)  # [S, B, H, D]
        y = y.permute(1, 2, 0, 3).permute(2, 0, 1, 3)
        return (y + 1).view(y.shape[0], -1)


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_view_behind_an_attention_runs(decomposed: bool) -> None:
    module = Attends().eval()
    program = torch.export.export(module, (torch.randn(3, 7, 16),), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    fused = fxfuse.fuse(program.run_decompositions() if decomposed else program)
    assert fxfuse.report(fused).counts["Attention"] == 1
    for batch, length in ((3, 7), (2, 9)):
        x = torch.randn(batch, length, 16)
        torch.testing.assert_close(fused.module()(x), module(x))


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_elementwise_step_between_changes_nothing(decomposed: bool) -> None:
    module = TurnedAndViewed().eval()
    shapes = ({0: Dim.AUTO, 2: Dim.AUTO},) * 3
    q, k, v = (torch.randn(3, 4, 7, 16) for _ in range(3))
    program = torch.export.export(module, (q, k, v), dynamic_shapes=shapes)
    fused = fxfuse.fuse(program.run_decompositions() if decomposed else program)
    assert fxfuse.report(fused).counts["Attention"] == 1
    for batch, length in ((3, 7), (2, 9)):
        inputs = [torch.randn(batch, 4, length, 16) for _ in range(3)]
        torch.testing.assert_close(fused.module()(*inputs), module(*inputs))


def test_in_onnx_the_copy_is_nothing() -> None:
    import fxfuse.onnx

    module = Attends().eval()
    program = torch.export.export(module, (torch.randn(3, 7, 16),), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    exported = fxfuse.onnx.export(program.run_decompositions())
    assert "Identity" not in [n.op_type for n in exported.model.graph]
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(onnxruntime_outputs(exported, (x,))[0], module(x), rtol=1e-4, atol=1e-5)
