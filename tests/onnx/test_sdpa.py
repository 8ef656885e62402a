"""Calls of scaled_dot_product_attention that no pattern takes load in ONNX Runtime, and say what PyTorch says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import fxfuse.onnx
from fxfuse.parity.ort import onnxruntime_outputs

A = Dim.AUTO
INF = float("inf")


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def dead_row(*shape: int) -> Tensor:
    mask = torch.ones(shape, dtype=torch.bool)
    mask[..., 0, :] = False
    mask[..., 1, ::2] = False
    return mask


CASES: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
    "no batch": ((rand(5, 8), rand(7, 8), rand(7, 6)), {}),
    "five dims": ((rand(2, 3, 4, 5, 8), rand(2, 3, 4, 7, 8), rand(2, 3, 4, 7, 8)), {}),
    "five dims, mask of one row": ((*[rand(2, 3, 4, 7, 8)] * 3, rand(2, 3, 4, 1, 7)), {}),
    "five dims, causal": ((rand(2, 3, 4, 5, 8), *[rand(2, 3, 4, 7, 8)] * 2), {"is_causal": True}),
    "five dims, grouped": ((rand(2, 3, 4, 5, 8), *[rand(2, 3, 2, 7, 8)] * 2), {"enable_gqa": True}),
    "keys of one batch": ((rand(2, 4, 5, 8), *[rand(1, 4, 7, 8)] * 2), {}),
    "keys of one batch, mask of one row": ((rand(2, 4, 5, 8), *[rand(1, 4, 7, 8)] * 2, rand(2, 4, 1, 7)), {}),
    "rows that see nothing": ((rand(2, 4, 5, 8), *[rand(1, 4, 7, 8)] * 2, dead_row(2, 1, 5, 7)), {}),
    "rows of -inf": ((rand(5, 8), *[rand(7, 8)] * 2, torch.zeros(5, 7).masked_fill(~dead_row(5, 7), -INF)), {}),
    "a scale below 0": ((rand(5, 8), rand(7, 8), rand(7, 6)), {"scale": -0.7}),
}


class Call(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, *args: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*args, **self.options)


class Every(nn.Module):
    """All cases in one model."""

    def forward(self, operands: list[list[Tensor]]) -> list[Tensor]:
        options = [options for _, options in CASES.values()]
        return [Call(**o)(*t) for t, o in zip(operands, options, strict=True)]


@pytest.fixture(scope="module")
def operands() -> list[list[Tensor]]:
    return [[t.clone() for t in tensors] for tensors, _ in CASES.values()]


@pytest.mark.parametrize("door", ["fxfuse", "plugin"])
def test_what_attention_does_not_take_is_written_out(door: str, operands: list[list[Tensor]]) -> None:
    if door == "fxfuse":
        program = fxfuse.onnx.export(Every().eval(), (operands,), patterns=[])
    else:
        with fxfuse.onnx.enabled(patterns=[]):
            made = torch.onnx.export(Every().eval(), (operands,), dynamo=True, opset_version=24, verbose=False)
        assert made is not None
        program = made
    assert "Attention" not in [node.op_type for node in program.model.graph]
    found = onnxruntime_outputs(program, [t for tensors in operands for t in tensors])
    for name, one, expected in zip(CASES, found, Every()(operands), strict=True):
        assert torch.allclose(one, expected, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 4, 1, 7), (2, 1, 1, 7), (5, 7), (5, 1), (1, 1, 5, 7)], ids=str)
def test_masks_are_expanded_to_the_scores(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = (rand(2, 4, n, 8, dtype=dtype) for n in (5, 7, 7))
    mask = rand(*shape, dtype=dtype)
    program = fxfuse.onnx.export(Call().eval(), (q, k, v, mask), patterns=[])
    attentions = [node.op_type for node in program.model.graph].count("Attention")
    assert attentions == (0 if dtype == torch.float64 else 1), "Attention is not exact in float64"
    tolerance = {torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    (found,) = onnxruntime_outputs(program, (q, k, v, mask))
    torch.testing.assert_close(found, Call()(q, k, v, mask), rtol=tolerance, atol=tolerance)


def test_dynamic_lengths_and_groups() -> None:
    def made(batch: int, new: int, all_: int) -> tuple[Tensor, ...]:
        return rand(batch, 4, new, 8), *[rand(batch, 2, all_, 8) + i for i in range(2)], rand(batch, 4, 1, all_)

    batch, new, length = Dim("batch"), Dim("new"), Dim("length")
    shapes = ({0: batch, 2: new}, {0: batch, 2: length}, {0: batch, 2: length}, {0: batch, 3: length})
    model = Call(enable_gqa=True).eval()
    program = fxfuse.onnx.export(model, made(2, 5, 7), dynamic_shapes=(shapes,), patterns=[])
    assert [node.op_type for node in program.model.graph].count("Attention") == 1
    args = made(3, 6, 9)
    torch.testing.assert_close(onnxruntime_outputs(program, args)[0], model(*args), rtol=1e-4, atol=1e-5)
