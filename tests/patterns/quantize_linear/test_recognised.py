"""Activations quantised with scales that are kept become a pair of QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
import fxfuse.onnx
from fxfuse.report.model import Report

pytest.importorskip("torch.ao.quantization.fx._decomposed")
ops = torch.ops.quantized_decomposed
Q, DQ = torch.ops.fxfuse.quantize_linear.default, torch.ops.fxfuse.dequantize_linear.default


class OneScale(nn.Module):
    """PT2E's, with a scale for all.

    Args:
        low, high: the least and the greatest integer.
        other: by how much the scale is larger when it is dequantised.
    """

    def __init__(self, low: int = 0, high: int = 255, kind: torch.dtype = torch.uint8, other: float = 0.0) -> None:
        super().__init__()
        self.rest, self.other = (low, high, kind), other

    def forward(self, x: Tensor) -> Tensor:
        integers = ops.quantize_per_tensor(x, 0.04, 7, *self.rest)
        return ops.dequantize_per_tensor(integers, 0.04 + self.other, 7, *self.rest) * 2


class Channels(nn.Module):
    """With a scale and a zero point for each entry of an axis of [B, 5, 64]."""

    def __init__(self, axis: int, zero: int = 3) -> None:
        super().__init__()
        self.axis = axis
        count = (3, 5, 64)[axis]
        self.register_buffer("s", torch.rand(count, generator=torch.Generator().manual_seed(0)) * 0.05 + 0.01)
        self.register_buffer("z", torch.full([count], zero))

    def forward(self, x: Tensor) -> Tensor:
        rest = (self.s, self.z, self.axis, -128, 127, torch.int8)
        return ops.dequantize_per_channel(ops.quantize_per_channel(x, *rest), *rest) + 1


class Measured(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        scale, zero = ops.choose_qparams.tensor(x, 0, 255, 2.0**-12, torch.uint8)
        rest = (scale, zero, 0, 255, torch.uint8)
        return ops.dequantize_per_tensor.tensor(ops.quantize_per_tensor.tensor(x, *rest), *rest)


def fused(model: nn.Module, **options: Any) -> tuple[Report, list[torch.fx.Node]]:
    """The report, and the calls of fxfuse's operators; the numbers must stay, beyond both ends of the range too."""
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(2)) * 4
    result = fxfuse.fuse(torch.export.export(model.eval(), (x,)), **{"frozen": True, **options})
    torch.testing.assert_close(result.module()(x), model(x))
    return fxfuse.report(result), [n for n in result.graph.nodes if n.target in (Q, DQ)]


ENDS = [(0, 255, torch.uint8), (0, 127, torch.uint8), (-128, 127, torch.int8), (-127, 127, torch.int8)]


@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_one_scale(ends: tuple[int, int, torch.dtype]) -> None:
    report, nodes = fused(OneScale(*ends))
    assert [n.target for n in nodes] == [Q, DQ]
    (entry,) = report.fused()
    assert entry.parameters["range"] == list(ends[:2]) and entry.parameters["scale"] == 0.04
    info = torch.iinfo(ends[2])
    clamps = [n for n in nodes[0].users if "clamp" in str(n.target)]
    assert len(clamps) == (ends[:2] != (info.min, info.max))


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_channels(axis: int) -> None:
    _, nodes = fused(Channels(axis))
    assert [n.target for n in nodes] == [Q, DQ]
    assert {n.kwargs.get("axis", 1) for n in nodes} == {axis % 3}


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        (Measured(), {}, "measured as the input comes"),
        (OneScale(other=0.01), {}, "other scales than it is dequantised with"),
        (Channels(1, 300), {}, "lie beyond torch.int8"),
        (Channels(1), {"frozen": False}, "load_state_dict may change"),
    ],
)
def test_what_is_left_is_said(model: nn.Module, options: dict[str, Any], why: str) -> None:
    report, nodes = fused(model, **options)
    assert not nodes
    assert [e for e in report if e.operator == "QuantizeLinear" and why in str(e.reason)]


def test_unfused_again() -> None:
    x = torch.randn(3, 5, 64)
    plain = fxfuse.unfuse(fxfuse.fuse(torch.export.export(OneScale(), (x,))))
    assert not any("fxfuse" in str(n.target) for n in plain.graph.nodes)
    torch.testing.assert_close(plain.module()(x), OneScale()(x))


class Together(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([*(OneScale(*ends) for ends in ENDS), Channels(1), Channels(2)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def test_exported(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Together().eval()
    dynamic = ({0: torch.export.Dim.AUTO},)
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(2)) * 4
    written = fxfuse.onnx.export(model, (x,), tmp_path / "m.onnx", dynamic_shapes=dynamic).model
    kinds = [n.op_type for n in written.graph]
    assert kinds.count("DequantizeLinear") == len(model.layers)
    assert kinds.count("QuantizeLinear") == 4  # one for two ranges of the same type
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for given in (x, x[:2] * 0.3):
        for ours, theirs in zip(session.run(None, {"x": given.numpy()}), model(given), strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs)
