"""Translations that torch's exporter lacks, or that give other numbers there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fxfuse.onnx
from fxfuse.onnx.translate.missing import missing_translations
from fxfuse.parity.ort import OnnxRuntime


@pytest.fixture(scope="module")
def fallback() -> Iterator[torch._ops.OpOverload]:
    """transformers' own operator if it is there, else one of its name and meaning."""
    pytest.importorskip("transformers.integrations.moe")
    yield torch.ops.transformers.grouped_mm_fallback.default


class Experts(nn.Module):
    def __init__(self, operator: torch._ops.OpOverload, groups: int) -> None:
        super().__init__()
        self.operator = operator
        self.weight = nn.Parameter(torch.randn(groups, 8, 5))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return self.operator(x, self.weight, ends)


@pytest.mark.parametrize("groups", [1, 4])
def test_grouped_products_run_in_onnx_runtime(fallback: torch._ops.OpOverload, groups: int) -> None:
    module = Experts(fallback, groups).eval()
    x, ends = torch.randn(12, 8), torch.linspace(12 / groups, 12, groups).int()
    program = fxfuse.onnx.export(module, (x, ends), dynamic_shapes=({0: "tokens"}, {}))
    run = OnnxRuntime(program)
    for rows, last in ((12, 12), (7, 7), (9, 6)):  # the last: rows after the last group are 0
        x = torch.randn(rows, 8)
        ends = torch.tensor([last]) if groups == 1 else torch.tensor([2, 2, last - 1, last])  # one group is empty
        (got,) = run(x, ends.int())
        torch.testing.assert_close(got, module(x, ends.int()), rtol=1e-5, atol=1e-5)


def test_inverse_error_function_runs_in_onnx_runtime() -> None:
    class Quantile(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.erfinv(x)

    x = torch.cat([torch.linspace(-0.9999, 0.9999, 401), torch.tensor([-1.0, 0.0, 1e-6, 1.0])])
    (got,) = OnnxRuntime(fxfuse.onnx.export(Quantile().eval(), (x,)))(x)
    torch.testing.assert_close(got, torch.erfinv(x), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(4, 6), (1,)], ids=["two axes", "one element"])
@pytest.mark.parametrize("affine", [True, False])
def test_an_rms_norm_that_no_pattern_took_has_the_epsilon_of_its_type(
    dtype: torch.dtype, shape: tuple[int, ...], affine: bool
) -> None:
    module = nn.RMSNorm(shape, eps=None, elementwise_affine=affine, dtype=dtype).eval()
    x = torch.randn(3, 5, *shape[:-1], shape[-1], dtype=dtype) * 1e-3  # where the epsilon is as large as the squares
    program = fxfuse.onnx.export(module, (x,), dynamic_shapes=({0: "batch"},))
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3}[dtype]
    for rows in (3, 2):
        (result,) = OnnxRuntime(program)(x[:rows])
        torch.testing.assert_close(result, module(x[:rows]), rtol=tolerance, atol=tolerance)


def test_only_what_a_program_holds_is_translated() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.T

    assert missing_translations(torch.export.export(Plain(), (torch.randn(3, 3),)).graph.nodes) == {}
