"""What cannot stay small is said: a warning and a report entry, with the module and both sizes, through every door."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
import fxfuse.onnx
from fxfuse.errors import FxfuseWarning
from tests.patterns.dequantize_linear.models import WAYS, Written


class Codebook(nn.Module):
    """Sixteen numbers that integers of four bits stand for."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("codes", torch.randint(0, 16, (64, 64), dtype=torch.uint8, generator=generator))
        self.register_buffer("numbers", torch.randn(16, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.numbers[self.codes.long()].t()


class Doubled(nn.Module):
    """Scales in float64, which DequantizeLinear does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.ones(64, 64, dtype=torch.int8))
        self.register_buffer("rows", torch.rand(64, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.codes.double() * self.rows[:, None]).float().t()


class Float8(nn.Module):
    """torchao 0.18: float8 weights, widened and scaled by plain operators."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(64, 64).to(torch.float8_e4m3fn))
        self.register_buffer("rows", torch.rand(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.codes.to(torch.float32) * self.rows).t()


class Inside(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def plain(model: nn.Module) -> Any:
    return fxfuse.onnx.export(model, (torch.ones(2, 64),))


def plugin(model: nn.Module) -> Any:
    with fxfuse.onnx.enabled():
        return torch.onnx.export(model, (torch.ones(2, 64),), dynamo=True, opset_version=24, verbose=False)


@pytest.mark.parametrize("export", [plain, plugin])
@pytest.mark.parametrize(
    ("layer", "read"),
    [
        (Codebook, "16384 bytes of float32"),
        (Doubled, "32768 bytes of float64"),
        (Float8, "16384 bytes of float32"),
    ],
)
def test_it_is_said(export: Any, layer: type[nn.Module], read: str) -> None:
    with pytest.warns(FxfuseWarning, match=r"layer\.codes.*4096 bytes of (u?int8|float8_e4m3fn) are kept, ") as caught:
        program = export(Inside(layer()).eval())
    assert sum("becomes large" in str(w.message) for w in caught) == 1
    (entry,) = [e for e in fxfuse.report(program) if e.operator == "DequantizeLinear"]
    assert entry.reason is not None and f"are kept, {read} are read" in entry.reason
    assert entry.module == "layer" and entry.status != "fused"


def test_without_the_pattern_it_is_said_too() -> None:
    with pytest.warns(FxfuseWarning, match="nothing was found that keeps it small: 3072 bytes"):
        program = fxfuse.onnx.export(Written(WAYS["rows"][0]).eval(), (torch.ones(2, 64),), patterns=[])
    assert [e.reason for e in fxfuse.report(program)]


def test_what_stays_small_is_not_spoken_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FxfuseWarning)
        plain(Written(WAYS["groups"][0]).eval())
