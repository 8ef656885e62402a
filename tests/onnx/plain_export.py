"""What the plugin's tests export, as anybody would, and what they look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.onnx._internal.exporter import _core

from fxfuse.onnx import plugin


class Norm(nn.Module):
    """A norm and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(32) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        return torch.sigmoid(x) * torch.tanh(h)


X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
SHAPES = {"x": {0: "batch", 1: "sequence"}}
FUSED = {"RMSNormalization": 1}


def functions() -> list[Any]:
    return [getattr(_core, name) for name in plugin.HOOKS]


def export(model: Any, **options: Any) -> torch.onnx.ONNXProgram:
    """As anybody calls it; torch's default opset is 20."""
    kwargs = {"dynamic_shapes": SHAPES, "opset_version": 24, "verbose": False, **options}
    result = torch.onnx.export(model, (X,), dynamo=True, **kwargs)
    assert result is not None
    return result


def operators(program: torch.onnx.ONNXProgram) -> list[str]:
    return [node.op_type for node in program.model.graph]
