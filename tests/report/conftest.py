"""A small decoder with two numbered layers, fused; one line of it nearly matches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, ExportedProgram

import fxfuse
from fxfuse.report.model import Report


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.gate = Norm(), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x + y * torch.sigmoid(self.gate(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        h = x.unflatten(-1, (2, 8)).transpose(1, 2)
        scores = (h @ h.transpose(-1, -2) / 3).clamp(-3, 3)
        return torch.softmax(scores, -1) @ h


@pytest.fixture(scope="session")
def program() -> ExportedProgram:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    return torch.export.export(Model().eval(), (x,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},), strict=False)


@pytest.fixture(scope="session")
def report(program: ExportedProgram) -> Report:
    return fxfuse.report(fxfuse.fuse(program))
