"""Programs on another device, and what their cells say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.errors import FxfuseError
from fxfuse.parity.programs import check_device, module_on, program_cells

META = torch.device("meta")


class Net(nn.Module):
    """Weights, a buffer, a constant made in the graph, and a body of a higher-order operator that makes one too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(8, eps=1e-5), nn.Linear(8, 4)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            ramp = torch.arange(4, device=x.device) * 2.0
        return self.linear(self.norm(x)) + self.shift + ramp


def program() -> torch.export.ExportedProgram:
    return torch.export.export(Net().eval(), (torch.randn(2, 3, 8),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


@pytest.mark.parametrize("fused", [False, True])
def test_moving_leaves_the_program_where_it_is(fused: bool) -> None:
    own = fxfuse.fuse(program()) if fused else program()
    x = torch.randn(2, 3, 8)
    expected = own.module()(x)
    moved = module_on(own, META)
    assert moved(x.to(META)).device == META
    assert all(tensor.device == META for tensor in moved.state_dict().values())
    assert all(tensor.device.type == "cpu" for tensor in own.state_dict.values())
    torch.testing.assert_close(own.module()(x), expected)


def test_cells_of_a_program() -> None:
    found = list(program_cells("net", program()))
    assert [cell.point["case"] for cell in found[::4]] == ["export shape", "batch 1", "other shape"]
    assert [cell.implementation for cell in found[:4]] == ["eager", "composite", "triton", "onnxruntime"]
    if not torch.cuda.is_available():
        assert all(cell.passed and cell.ran for cell in found)


def test_an_operator_without_a_kernel_is_noted() -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rms_norm(x, (65537,), torch.ones(65537), 1e-5)

    wide = torch.export.export(Wide(), (torch.randn(2, 65537),))
    cell = next(c for c in program_cells("wide", wide) if c.implementation == "triton")
    if not torch.cuda.is_available():
        assert cell.passed and cell.reason == "without rms_norm: a row of 65537 elements is longer than 65536"


def test_devices() -> None:
    assert check_device("cpu") == torch.device("cpu")
    with pytest.raises(FxfuseError, match="not tried on meta"):
        check_device("meta")
