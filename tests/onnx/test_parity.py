"""The judge itself: rounding passes, a wrong model does not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

import fxfuse.onnx
from fxfuse.errors import FxfuseError
from fxfuse.parity import (
    OnnxRuntime,
    compare,
    float32_twin,
    onnxruntime_outputs,
    shape_cases,
    wide_outputs,
    working_dtype,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Net(nn.Module):
    """Rounds in many places: casts up and down, a norm, softmax; and a second, integer output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Embedding(50, 32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, tokens: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(tokens)
        x = x + self.down(torch.softmax(self.up(x).float(), -1).to(x.dtype) * 30)
        with torch.no_grad():
            x = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) + bias
        return x, x.argmax(-1)


def captured(dtype: torch.dtype) -> tuple[nn.Module, torch.export.ExportedProgram]:
    net = Net().to(dtype).eval()
    args = (torch.arange(14).reshape(2, 7), torch.ones(7, 1, dtype=dtype))
    shapes = {"tokens": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "bias": {0: Dim.DYNAMIC, 1: None}}
    return net, torch.export.export(net, args, dynamic_shapes=shapes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_is_the_program_without_its_rounding(dtype: torch.dtype) -> None:
    net, program = captured(dtype)
    args, _ = program.example_inputs
    wide = wide_outputs(program, args)[0]
    # Weights and inputs keep the values that they were rounded to; only what is computed from them is exact.
    exact = Net().to(dtype).double()
    exact.load_state_dict({name: tensor.double() for name, tensor in net.state_dict().items()})

    class Float64(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return args[0] if func is torch.Tensor.float else func(*args, **(kwargs or {}))

    with torch.no_grad(), Float64():
        truth = exact(args[0], args[1].double())[0]
    assert wide.dtype == (torch.float64 if dtype == torch.float32 else torch.float32)
    assert (wide.double() - truth).abs().max() < (1e-12 if dtype == torch.float32 else 1e-5)
    assert working_dtype(program) == dtype
    eager = net(*args)[0].double()
    assert (eager - truth).abs().max() > 4 * (wide.double() - truth).abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_passes_and_mistakes_do_not(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(4, 1000, generator=generator, dtype=torch.float64)
    eps = torch.finfo(dtype).eps

    def rounded(ulps: float) -> torch.Tensor:
        return (wide + ulps * eps * torch.randn(wide.shape, generator=generator, dtype=torch.float64)).to(dtype)

    eager = rounded(3)
    assert compare([eager], [rounded(3)], [wide]).passed
    assert not compare([eager], [rounded(20)], [wide]).passed
    swapped = eager.clone()
    swapped[0] = eager[1]
    assert "RMS error" in str(compare([eager], [swapped], [wide]).reason)
    one = eager.clone()
    one[2, 7] += 150 * eps
    assert "max error" in str(compare([eager], [one], [wide]).reason)
    assert compare([eager], [eager], [wide]).max_abs == 0


def test_a_few_elements_have_no_rms() -> None:
    wide = torch.ones(3, dtype=torch.float64)
    eager = wide.float()  # exact, as a few elements can be
    eps = torch.finfo(torch.float32).eps
    assert compare([eager], [eager + 8 * eps], [wide]).passed
    assert not compare([eager], [eager + 40 * eps], [wide]).passed
    many = torch.ones(100, dtype=torch.float64)
    assert not compare([many.float()], [many.float() + 8 * eps], [many]).passed


def test_a_floor_for_what_cancels() -> None:
    wide, noise = torch.full((100,), 1e-9, dtype=torch.float64), torch.full((100,), 1e-7)
    assert "nothing can be told" in str(compare([noise], [noise], [wide]).reason)
    assert compare([noise], [-noise], [wide], floor=1.0).passed
    assert not compare([noise], [noise * 20], [wide], floor=1.0).passed


def test_without_a_wide_result_the_bounds_are_fixed() -> None:
    eager = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert compare([eager], [eager + 5e-5]).passed
    assert not compare([eager], [eager + 5e-4]).passed


def test_a_model_that_is_all_rounding_proves_nothing() -> None:
    wide = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    result = compare([wide.float() + noise], [wide.float() + noise], [wide])
    assert not result.passed and "nothing can be told" in str(result.reason)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ([torch.ones(3)], "shape"),
        ([torch.ones(2, 2), torch.ones(2)], "2 outputs instead of 1"),
        ([torch.tensor([[1.0, math.nan], [1.0, 1.0]])], "not finite"),
        ([], "0 outputs"),
    ],
    ids=["shape", "more", "nan", "fewer"],
)
def test_what_cannot_be_compared_fails(other: list[torch.Tensor], reason: str) -> None:
    result = compare([torch.ones(2, 2)], other)
    assert not result.passed and reason in str(result.reason)


def test_integers_must_be_equal_and_the_output_is_named() -> None:
    pair = [torch.ones(2), torch.tensor([1, 2, 3])]
    assert compare(pair, pair).passed
    result = compare(pair, [torch.ones(2), torch.tensor([1, 2, 4])])
    assert result.reason == "output 1: 1 of 3 elements differ"


def test_infinities_must_agree() -> None:
    eager = torch.tensor([1.0, -math.inf, 2.0])
    assert compare([eager], [eager]).passed
    assert not compare([eager], [torch.tensor([1.0, math.inf, 2.0])]).passed


def test_shapes_share_their_symbols() -> None:
    _, program = captured(torch.float32)
    cases = {case.label: [tuple(t.shape) for t in case.inputs] for case in shape_cases(program)}
    assert cases["export shape"] == [(2, 7), (7, 1)]
    # The length is the first dimension of `bias`, and is taken for a batch too: both inputs still agree on it.
    assert cases["batch 1"] == [(1, 1), (1, 1)]
    assert cases["other shape"] == [(3, 8), (8, 1)]
    for case in shape_cases(program):
        program.module(check_guards=False)(*case.args)


def test_static_programs_have_one_shape() -> None:
    program = torch.export.export(nn.Linear(3, 3).eval(), (torch.ones(2, 3),))
    assert [case.label for case in shape_cases(program)] == ["export shape"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_onnx_runtime_agrees(dtype: torch.dtype, tmp_path: Path) -> None:
    net, program = captured(dtype)
    path = tmp_path / "net.onnx"
    fxfuse.onnx.export(program, f=path)
    if dtype == torch.bfloat16:
        float32_twin(path, tmp_path / "twin.onnx")
        path = tmp_path / "twin.onnx"
    session = OnnxRuntime(path)
    for case in shape_cases(program):
        inputs = [t.float() if t.dtype == torch.bfloat16 else t for t in case.inputs]
        with torch.no_grad():
            eager = net(*case.args)[0]
        result = compare([eager], session(*inputs)[:1], wide_outputs(program, case.args)[:1], dtype)
        assert result.passed, (case, result)


def test_onnx_runtimes_refusals_are_ours(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(FxfuseError, match=r"does not load"):
        OnnxRuntime(tmp_path / "bad.onnx")
    exported = fxfuse.onnx.export(nn.Linear(3, 3).eval(), (torch.ones(2, 3),))
    with pytest.raises(FxfuseError, match="1 inputs"):
        onnxruntime_outputs(exported, [])
    with pytest.raises(FxfuseError, match="fails to run"):
        onnxruntime_outputs(exported, [torch.ones(2, 4)])
