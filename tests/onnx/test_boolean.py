"""A model that combines masks by masked_fill and where loads in ONNX Runtime, and computes the same."""

from __future__ import annotations

import torch
from torch import nn
from torch.export import Dim

import fxfuse.onnx
from fxfuse.parity.ort import onnxruntime_outputs


class Combine(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        mask = a.masked_fill(b, True) & torch.where(b, a, ~a)
        return x.masked_fill(mask, 0.0)


def test_boolean_where_is_written_with_and_or_not() -> None:
    inputs = (torch.rand(3, 4) < 0.5, torch.rand(3, 4) < 0.5, torch.randn(3, 4))
    shapes = tuple({0: Dim.DYNAMIC} for _ in inputs)
    program = fxfuse.onnx.export(Combine().eval(), inputs, dynamic_shapes=shapes)
    assert [n.op_type for n in program.model.graph].count("Where") == 1, "the one on floats stays"
    for size in (3, 5):
        values = (torch.rand(size, 4) < 0.5, torch.rand(size, 4) < 0.5, torch.randn(size, 4))
        (actual,) = onnxruntime_outputs(program, values)
        torch.testing.assert_close(actual, Combine()(*values))
