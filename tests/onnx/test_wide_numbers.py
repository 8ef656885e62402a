"""float64 models whose masks are made with the type's minimum, which float32 does not hold: right in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxfuse
import fxfuse.onnx
from fxfuse.parity.ort import OnnxRuntime

LOWEST = torch.finfo(torch.float64).min
MASKS: dict[str, Any] = {
    "product": lambda keep: (1 - keep.double()) * LOWEST,
    "filled": lambda keep: torch.zeros_like(keep, dtype=torch.float64).masked_fill(~keep, LOWEST),
}


class Masked(nn.Module):
    """softmax(q · kᵀ + mask) of `[B, H, S, D]`, and keys that are seen `[B, S]`."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, q: Tensor, k: Tensor, keep: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) + MASKS[self.mask](keep[:, None, None])).softmax(-1)


@pytest.mark.parametrize("mask", MASKS)
def test_numbers_of_float64_stay(mask: str) -> None:
    q, k = (torch.randn(2, 2, 4, 8, dtype=torch.float64) for _ in range(2))
    keep = torch.tensor([[True] * 4, [True, False, True, False]])
    model = Masked(mask).eval()
    program = fxfuse.onnx.export(model, (q, k, keep), dynamic_shapes=({0: Dim.AUTO},) * 3)
    for keys in (keep, torch.zeros_like(keep)):
        (got,) = OnnxRuntime(program)(q, k, keys)
        torch.testing.assert_close(got, model(q, k, keys))


def test_an_operator_that_takes_numbers_only_is_named() -> None:
    class Bounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.threshold(x, LOWEST, 0.0)

    with pytest.raises(fxfuse.FxfuseError, match=r"float32, which -1\.79.*does not fit"):
        fxfuse.onnx.export(Bounded().eval(), (torch.randn(3, dtype=torch.float64),))
