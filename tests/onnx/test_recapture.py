"""A model that asks whether its length is a multiple of something is captured so that every length is right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import fxfuse.onnx
from fxfuse.onnx.capturing.capture import capture
from fxfuse.parity.ort import OnnxRuntime


class Chunks(nn.Module):
    """Sums over chunks of four, the last one padded; the padding is cut only where there is some (Mamba 2)."""

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        padding = (4 - length % 4) % 4
        chunks = F.pad(x, (0, 0, 0, padding)).reshape(x.shape[0], -1, 4, x.shape[2])
        y = chunks.cumsum(2).reshape(x.shape[0], -1, x.shape[2])
        if padding > 0:
            y = y[:, :length]
        return y.tanh()


class Alternating(nn.Module):
    """Two functions for two kinds of length: no one program is right for both."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() if x.shape[1] % 4 == 0 else x.cos()


DYNAMIC = ({0: Dim.AUTO, 1: Dim.AUTO},)


@pytest.mark.parametrize("length", [8, 7])
def test_holds_at_every_length(length: int) -> None:
    module = Chunks().eval()
    run = OnnxRuntime(fxfuse.onnx.export(module, (torch.randn(2, length, 3),), dynamic_shapes=DYNAMIC))
    for batch, other in ((2, 8), (3, 5), (1, 12), (2, 7)):
        x = torch.randn(batch, other, 3)
        (got,) = run(x)
        torch.testing.assert_close(got, module(x))


def test_another_capture_that_computes_something_else_is_not_taken() -> None:
    module, x = Alternating().eval(), torch.randn(2, 8, 3)
    program = capture(module, (x,), dynamic_shapes=DYNAMIC)
    torch.testing.assert_close(program.module()(x), x.sin())


def test_a_capture_without_such_guards_is_the_first() -> None:
    module, x = nn.Linear(3, 3).eval(), torch.randn(2, 8, 3)
    program = capture(module, (x,), dynamic_shapes=DYNAMIC)
    assert program.example_inputs[0][0].shape == x.shape
