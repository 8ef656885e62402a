"""Attention of matrices, ``[S, D]``: no batch and no heads; and of keys that a module keeps for every batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxfuse
import fxfuse.onnx
from fxfuse.parity.ort import onnxruntime_outputs

D, E, T = 16, 8, 9


class Matrices(nn.Module):
    def __init__(self, how: Callable[..., Tensor]) -> None:
        super().__init__()
        self.how = how
        self.keys, self.values = nn.Parameter(torch.randn(T, D)), nn.Parameter(torch.randn(T, E))

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def causal(x: Tensor) -> Tensor:
    return torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).tril()


WAYS: dict[str, Callable[[Matrices, Tensor], Tensor]] = {
    "one matrix": lambda m, x: (x @ x.T / 4).softmax(-1) @ x,
    "causal": lambda m, x: (x @ x.T / 4).masked_fill(~causal(x), float("-inf")).softmax(-1) @ x,
    "mm": lambda m, x: torch.mm(torch.mm(x, x.t()).mul(0.25).softmax(1), x),
    "keys that are kept": lambda m, x: (x @ m.keys.T / 4).softmax(-1) @ m.values,
    "one query that is kept": lambda m, x: (m.keys[:1] @ x.T).softmax(-1) @ x,
}


@pytest.mark.parametrize("way", WAYS)
def test_attention_of_matrices(way: str) -> None:
    torch.manual_seed(0)
    module = Matrices(WAYS[way]).eval()
    exported = fxfuse.onnx.export(module, (torch.randn(12, D),), dynamic_shapes=({0: Dim.AUTO},))
    assert fxfuse.report(exported).counts["Attention"] == 1
    x = torch.randn(7, D)
    torch.testing.assert_close(onnxruntime_outputs(exported, (x,))[0], module(x), rtol=1e-4, atol=1e-5)


def test_keys_that_are_kept_serve_every_batch() -> None:
    torch.manual_seed(0)
    module = Matrices(WAYS["keys that are kept"]).eval()
    exported = fxfuse.onnx.export(module, (torch.randn(2, 12, D),), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    assert fxfuse.report(exported).counts["Attention"] == 1
    x = torch.randn(3, 7, D)
    torch.testing.assert_close(onnxruntime_outputs(exported, (x,))[0], module(x), rtol=1e-4, atol=1e-5)


def test_what_is_no_softmax_over_the_keys_is_none() -> None:
    module = Matrices(lambda m, x: (x @ m.keys.T / 4).softmax(0) @ m.values).eval()
    program = fxfuse.fuse(torch.export.export(module, (torch.randn(12, D),), dynamic_shapes=({0: Dim.AUTO},)))
    assert fxfuse.report(program).counts.get("Attention", 0) == 0
    x = torch.randn(7, D)
    torch.testing.assert_close(program.module()(x), module(x))
