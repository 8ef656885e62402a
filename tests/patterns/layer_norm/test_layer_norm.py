"""LayerNorm in every spelling becomes one LayerNormalization; what is none over the last axis is told why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import fxfuse
import fxfuse.onnx
from fxfuse.parity.ort import onnxruntime_outputs

WIDTH = 16
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


class Norm(nn.Module):
    def __init__(self, function: Function, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter((torch.rand(WIDTH) + 0.5).to(dtype))
        self.bias = nn.Parameter(torch.randn(WIDTH).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


def less(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def variance(x: Tensor, **how: Any) -> Tensor:
    return x.var(-1, keepdim=True, **how)


def plain(x: Tensor) -> Tensor:
    return less(x) / (variance(x, correction=0) + 1e-5).sqrt()


def by_hand(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    u = x.mean(-1, keepdim=True)
    s = (x - u).pow(2).mean(-1, keepdim=True)
    return w * ((x - u) / torch.sqrt(s + 1e-12)) + b


def var_mean(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + 1e-5) * w + b


def in_float32(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return plain(x.float()).to(x.dtype) * w + b


def of_centred(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    c = less(x)
    return w * (c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5))


FUSED: dict[str, Function] = {
    "by hand": by_hand,
    "var, correction=0": lambda x, w, b: plain(x) * w + b,
    "var, unbiased=False": lambda x, w, b: less(x) * torch.rsqrt(variance(x, unbiased=False) + 1e-5) * w + b,
    "var_mean": var_mean,
    "a power": lambda x, w, b: less(x) * (less(x).square().mean(-1, True) + 1e-5) ** -0.5 * w + b,
    "std without an epsilon": lambda x, w, b: less(x) / x.std(-1, unbiased=False, keepdim=True) * w + b,
    "no scale and no bias": lambda x, w, b: plain(x),
    "no bias": lambda x, w, b: plain(x) * w,
    "no scale": lambda x, w, b: plain(x) + b,
    "1 + w": lambda x, w, b: plain(x) * (1 + w) + b,
    "one tensor for both": lambda x, w, b: plain(x) * w + w,
    "an RMSNorm of x less its mean": of_centred,
    "F.rms_norm of x less its mean": lambda x, w, b: F.rms_norm(less(x), (WIDTH,), w, 1e-5),
    "two axes brought together": lambda x, w, b: plain(x.reshape(x.shape[0], 5 * WIDTH)).reshape(x.shape[0], 5, WIDTH),
    "a residual before it": lambda x, w, b: by_hand(x + x.sin(), w, b),
    "a residual after it": lambda x, w, b: x + by_hand(x, w, b),
}


def fused(function: Function, x: Tensor, dynamic: bool = True) -> tuple[Norm, Any]:
    model = Norm(function, x.dtype).eval()
    shapes = ({0: Dim.AUTO},) if dynamic else None
    return model, fxfuse.fuse(torch.export.export(model, (x,), dynamic_shapes=shapes))


@pytest.mark.parametrize("case", FUSED)
def test_a_spelling_becomes_one_operator(case: str) -> None:
    model, program = fused(FUSED[case], torch.randn(2, 5, WIDTH))
    (entry,) = fxfuse.report(program)
    assert (entry.status, entry.operator) == ("fused", "LayerNormalization"), entry
    x = torch.randn(3, 5, WIDTH) * 3 + 1
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_moments_of_x_lose_what_the_operator_keeps() -> None:
    """mean(x²) - mean(x)² cancels where x is far from 0: fused, for the operator rounds less than the model does."""
    model, program = fused(
        lambda x, w, b: less(x) * torch.rsqrt(x.square().mean(-1, True) - x.mean(-1, True).square() + 1e-5) * w + b,
        torch.randn(2, 5, WIDTH),
    )
    assert fxfuse.report(program).counts == {"LayerNormalization": 1}
    x = torch.randn(3, 5, WIDTH)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


def test_float32_inside_of_half() -> None:
    model, program = fused(in_float32, torch.randn(2, 5, WIDTH).half())
    assert fxfuse.report(program).counts == {"LayerNormalization": 1}
    x = torch.randn(3, 5, WIDTH).half()
    torch.testing.assert_close(program.module()(x), model(x), rtol=2e-3, atol=2e-3)


def test_float64_stays_float64() -> None:
    model, program = fused(by_hand, torch.randn(2, 5, WIDTH).double())
    assert fxfuse.report(program).counts == {"LayerNormalization": 1}
    x = torch.randn(3, 5, WIDTH).double()
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-12, atol=1e-12)


TOLD: dict[str, tuple[Function, str]] = {
    "unbiased": (lambda x, w, b: less(x) * torch.rsqrt(variance(x) + 1e-5) * w + b, "correction=0"),
    "an epsilon beside the root": (
        lambda x, w, b: less(x) / (x.std(-1, unbiased=False, keepdim=True) + 1e-5) * w + b,
        "outside of the root",
    ),
    "channels": (
        lambda x, w, b: (x - x.mean(1, True)) * torch.rsqrt(x.var(1, correction=0, keepdim=True) + 1e-5),
        "over axis 1 of 3",
    ),
}


@pytest.mark.parametrize("case", TOLD)
def test_what_is_none_is_told_why(case: str) -> None:
    function, said = TOLD[case]
    _, program = fused(function, torch.randn(2, 5, WIDTH))
    entries = list(fxfuse.report(program))
    assert [e.status for e in entries] == ["near miss"] and said in str(entries[0].reason)


def test_a_call_of_layer_norm_stays_as_it_is() -> None:
    _, program = fused(lambda x, w, b: F.layer_norm(x, (WIDTH,), w, b), torch.randn(2, 5, WIDTH))
    assert not list(fxfuse.report(program))


def test_what_reads_it_reads_its_first_output() -> None:
    x = torch.randn(2, 5, WIDTH)
    model = Norm(lambda x, w, b: F.linear(by_hand(x, w, b), torch.ones(3, WIDTH)).view(-1, 5, 3)).eval()
    program = fxfuse.onnx.export(model, (x,), dynamic_shapes=({0: Dim.AUTO},))
    (node,) = (node for node in program.model.graph if node.op_type == "LayerNormalization")
    assert [value.is_graph_output() or bool(value.uses()) for value in node.outputs] == [True], "and has no other"
    torch.testing.assert_close(onnxruntime_outputs(program, (x,))[0], model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["by hand", "no bias", "an RMSNorm of x less its mean"])
def test_it_leaves_as_one_onnx_node(case: str) -> None:
    x = torch.randn(2, 5, WIDTH)
    model = Norm(FUSED[case]).eval()
    program = fxfuse.onnx.export(model, (x,), dynamic_shapes=({0: Dim.AUTO},))
    assert [node.op_type for node in program.model.graph] == ["LayerNormalization"]
    torch.testing.assert_close(onnxruntime_outputs(program, (x,))[0], model(x), rtol=1e-4, atol=1e-5)
