"""Norms that keep from dividing by 0 with a bound: `F.normalize(x) * √D * g`, and an epsilon that can stand for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import fxfuse
import fxfuse.onnx
from fxfuse.parity import onnxruntime_outputs

WIDTH = 16
ROOT = WIDTH**0.5
AXES = ({0: Dim.AUTO, 1: Dim.AUTO},)


class Norm(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def size(x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True)


TAKEN = {
    "normalize": lambda x, w: F.normalize(x, dim=-1) * ROOT * w,
    "normalize, an offset": lambda x, w: F.normalize(x, dim=-1) * ROOT * (w + 1),
    "normalize alone": lambda x, w: F.normalize(x, dim=-1),
    "normalize by heads": lambda x, w: F.normalize(x.unflatten(-1, (2, 8)), dim=-1).flatten(-2) * ROOT,
    "a norm that is clamped": lambda x, w: x / size(x).clamp(min=1e-12) * ROOT * w,
    "the larger of two": lambda x, w: x / torch.maximum(size(x), torch.tensor(1e-12)) * ROOT * w,
    "a root that is clamped": lambda x, w: x / x.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12) * ROOT * w,
    "a mean that is clamped": lambda x, w: x * x.square().mean(-1, keepdim=True).clamp(min=1e-24).rsqrt() * w,
}
LEFT = {
    "a bound that rows reach": (lambda x, w: F.normalize(x, dim=-1, eps=1e-3) * w, "smaller than 2"),
    "an epsilon beside the root": (lambda x, w: x / (size(x) + 1e-8) * w, "add it to the mean square instead"),
    "a bound on both sides": (lambda x, w: x / size(x).clamp(1e-12, 1e6) * w, "clamp@test_bounded_norms.py"),
}


def captured(
    function: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float32
) -> tuple[Norm, ExportedProgram]:
    model = Norm(function).eval().to(dtype)
    return model, torch.export.export(model, (rows(dtype),), dynamic_shapes=AXES)


def rows(dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    """One of them 0, the others of all sizes that a model may have."""
    x = torch.randn(batch, 12, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = torch.tensor([0.0] + [10.0**-k for k in range(-2, 9)], dtype=torch.float64)
    return (x * sizes[:, None]).to(dtype)


@pytest.mark.parametrize("case", TAKEN)
def test_an_epsilon_stands_for_the_bound(case: str) -> None:
    model, program = captured(TAKEN[case])
    made = fxfuse.fuse(program)
    (entry,) = fxfuse.report(made)
    assert entry.status == "fused" and "root mean square) differ by up to" in str(entry.evidence)
    for x in (rows(), rows(batch=3), torch.zeros(1, 1, WIDTH)):
        torch.testing.assert_close(made.module()(x), model(x), rtol=2e-6, atol=1e-7)


def test_it_differs_only_where_the_report_says() -> None:
    model, program = captured(TAKEN["normalize"])
    module = fxfuse.fuse(program).module()
    for scale, most in ((2e-9, 1e-6), (1e-13, 0.3), (1e-20, 1e-6)):
        x = torch.ones(1, 1, WIDTH) * scale
        off = ((module(x) - model(x)).abs() / model(x).abs()).max()
        assert off <= most


@pytest.mark.parametrize("case", LEFT)
def test_what_rows_can_reach_is_left(case: str) -> None:
    function, said = LEFT[case]
    (entry,) = fxfuse.report(fxfuse.fuse(captured(function)[1]))
    assert entry.status != "fused" and said in str(entry.reason)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    model, program = captured(TAKEN["normalize"], dtype)
    made = fxfuse.fuse(program)
    (entry,) = fxfuse.report(made)
    x = rows(dtype)[:, 1:6]
    torch.testing.assert_close(made.module()(x), model(x), rtol=1e-2, atol=1e-2)
    zeros = model(torch.zeros(1, 1, WIDTH, dtype=dtype))
    assert ("rows of 0 are nan in the model" in str(entry.evidence)) == bool(zeros.isnan().any())
    assert ("differ by up to" in str(entry.evidence)) == (dtype == torch.bfloat16)  # float16 has no such rows


def test_strict_leaves_it_at_every_door() -> None:
    model, program = captured(TAKEN["normalize"])
    (entry,) = fxfuse.report(fxfuse.fuse(program, strict=True))
    assert entry.status == "near miss" and "without strict=True it is fused" in str(entry.reason)
    assert not fxfuse.report(fxfuse.onnx.export(program, strict=True)).counts
    marked = fxfuse.prepass(model, strict=True)
    assert not fxfuse.report(fxfuse.onnx.export(marked, (rows(),))).counts
    with fxfuse.onnx.enabled(strict=True):
        onnx = torch.onnx.export(Norm(TAKEN["normalize"]).eval(), (rows(),), opset_version=24, verbose=False)
    assert not fxfuse.report(onnx).counts
    fxfuse.verify(program, fxfuse.fuse(program))
    with pytest.raises(fxfuse.FxfuseError, match="where: strict"):
        fxfuse.fuse(program, strict="yes")  # type: ignore[arg-type]


def test_the_file_computes_what_the_model_does() -> None:
    model, program = captured(TAKEN["normalize"])
    exported = fxfuse.onnx.export(program)
    assert [n.op_type for n in exported.model.graph].count("RMSNormalization") == 1
    x = rows(batch=3)
    torch.testing.assert_close(onnxruntime_outputs(exported, [x]), [model(x)], rtol=1e-5, atol=1e-6)
