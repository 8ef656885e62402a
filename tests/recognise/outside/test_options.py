"""check=, decomposition=, onnx=: what a user gives beside the operator, and what is said where it is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from onnxscript import opset23 as op
from torch import Tensor, nn
from torch.export import Dim

import fxfuse
import fxfuse.onnx
from fxfuse.errors import FxfuseError
from tests.recognise.outside import operators
from tests.recognise.outside.models import Block, Mlp
from tests.recognise.outside.test_fused import captured, inputs, run


def swiglu(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = (x @ weight.T).chunk(2, -1)
    return F.silu(gate) * up


def norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    added = x + residual
    return F.layer_norm(added, weight.shape, weight, bias, eps), added


@pytest.fixture(autouse=True)
def patterns(patterns: dict[str, Any]) -> Iterator[None]:
    """Without those of the other tests, and those of a test only while it runs."""
    for pattern in patterns.values():
        pattern.unregister()
    yield
    for name in ("swiglu", "norm"):
        fxfuse.recognise.catalogue.unregister(name)


def fused(example: Any, model: nn.Module | None = None, count: int = 1) -> fxfuse.Report:
    return fxfuse.report(fxfuse.fuse(captured(model or Mlp(), count), patterns=[example]))


def test_check_refuses_with_a_reason() -> None:
    def wide(x: Tensor, weight: Tensor) -> str | None:
        return None if weight.shape[0] % 64 == 0 else f"the kernel takes rows of 64, not {weight.shape[0]}"

    report = fused(fxfuse.pattern(replacement=operators.packed_swiglu, check=wide)(swiglu))
    (entry,) = report.near_misses("swiglu")
    assert not report.fused() and entry.reason == "the kernel takes rows of 64, not 24"


def test_check_is_given_tensors_and_numbers_in_the_examples_order() -> None:
    seen: dict[str, Any] = {}

    def look(**given: Any) -> None:
        seen.update(given)

    def check(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
        look(x=x, weight=weight, bias=bias, eps=eps)

    report = fused(fxfuse.pattern(replacement=operators.add_layer_norm, check=check)(norm), Block(), 2)
    assert report.counts == {"norm": 1}
    assert seen["x"].dim() == 3 and seen["weight"].shape == seen["bias"].shape == (16,) and seen["eps"] == 3e-4


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (lambda x, weight: 1 / 0, "the pattern swiglu could not be asked: ZeroDivisionError"),
        (lambda x, weight: False, "the check of the pattern swiglu gives False, neither None nor a reason"),
        (lambda x, weight: None if x.shape[0] > 3 else "a small batch", "swiglu could not be asked"),
    ],
    ids=["raises", "gives no reason", "asks about a symbol"],
)
def test_a_check_that_is_wrong_is_named(check: Any, said: str) -> None:
    program = captured(Mlp(), 1)
    (x,) = (n.meta["val"] for n in program.graph.nodes if n.name == "x")
    guards = len(x.fake_mode.shape_env.guards)
    pattern = fxfuse.pattern(replacement=operators.packed_swiglu, check=check)(swiglu)
    report = fxfuse.report(fxfuse.fuse(program, patterns=[pattern]))
    assert not report.fused()
    assert any(said in str(e.reason) for e in report.near_misses("swiglu")), [str(e.reason) for e in report]
    assert len(x.fake_mode.shape_env.guards) == guards


def test_unfuse_takes_the_decomposition() -> None:
    def by_exp(x: Tensor, weight: Tensor) -> Tensor:
        gate, up = F.linear(x, weight).chunk(2, -1)
        return gate / (1 + torch.exp(-gate)) * up

    pattern = fxfuse.pattern(replacement=operators.packed_swiglu, decomposition=by_exp)(swiglu)
    program = fxfuse.fuse(captured(Mlp(), 1), patterns=[pattern])
    names = {str(n.target) for n in fxfuse.unfuse(program).graph.nodes}
    assert "aten.exp.default" in names and "aten.sigmoid.default" not in names
    assert not any("fxfuse_outside" in name for name in names)
    again = {str(n.target) for n in program.run_decompositions(fxfuse.ops.decompositions()).graph.nodes}
    assert again == names
    pattern.unregister()
    assert any("fxfuse_outside" in str(n.target) for n in fxfuse.unfuse(program).graph.nodes)


@pytest.mark.parametrize(
    ("decomposition", "said"),
    [
        (lambda x, weight: x @ weight.T, "gives [3, 5, 24] where the example gives [3, 5, 12]"),
        (lambda x, weight: (swiglu(x, weight), x), "gives [3, 5, 12], [3, 5, 16] where the example"),
        (lambda x, weight: swiglu(x, weight) * 1.0001, "the decomposition of swiglu differs in float64"),
        (lambda x, weight: x.missing, "the pattern swiglu could not be asked: AttributeError"),
    ],
    ids=["another shape", "another number", "other values", "raises"],
)
def test_a_decomposition_that_gives_something_else(decomposition: Any, said: str) -> None:
    pattern = fxfuse.pattern(replacement=operators.packed_swiglu, decomposition=decomposition)(swiglu)
    report = fused(pattern)
    assert not report.fused() and any(said in str(e.reason) for e in report), [str(e.reason) for e in report]


def test_a_replacement_with_another_number_of_results() -> None:
    pattern = fxfuse.pattern(replacement=lambda x, r, w, b, eps: norm(x, r, w, b, eps)[0])(norm)
    (entry,) = fused(pattern, Block(), 2).refused("norm")
    assert "gives 1 results where the example gives 2" in str(entry.reason)


def test_a_function_of_onnxscript_values_is_written_out_in_place() -> None:
    def written(x: Any, weight: Any) -> Any:
        gate, up = op.Split(op.MatMul(x, op.Transpose(weight, perm=[1, 0])), num_outputs=2, axis=-1)
        return op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)

    fxfuse.pattern(replacement=operators.packed_swiglu, onnx=written)(swiglu)
    model = Mlp().eval()
    exported = fxfuse.onnx.export(model, inputs(1), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    assert not exported.model.functions and {n.domain for n in exported.model.graph} == {""}
    given = inputs(1, 3, 7)
    torch.testing.assert_close(run(exported, given)[0], model(*given), rtol=2e-5, atol=2e-5)


def test_plain_torch_takes_the_table() -> None:
    """torch.onnx inlines functions, so there the operator is written out."""
    pattern = fxfuse.pattern(replacement=operators.packed_swiglu, onnx=operators.PackedSwiGLU)(swiglu)
    model = Mlp().eval()
    program = fxfuse.fuse(captured(model, 1), patterns=[pattern])
    table = fxfuse.onnx.translation_table(24)
    exported = torch.onnx.export(program, dynamo=True, opset_version=24, custom_translation_table=table, verbose=False)
    assert exported is not None
    given = inputs(1)
    torch.testing.assert_close(run(exported, given)[0], model(*given), rtol=2e-5, atol=2e-5)
    pattern.unregister()
    assert torch.ops.fxfuse_outside.packed_swiglu.default not in fxfuse.onnx.translation_table(24)


def test_bad_arguments() -> None:
    with pytest.raises(FxfuseError, match=r"onnx= cannot be called: 'SwiGLU'(.|\n)*pattern swiglu"):
        fxfuse.pattern(replacement=operators.packed_swiglu, onnx="SwiGLU")(swiglu)  # type: ignore[arg-type]
    with pytest.raises(FxfuseError, match=r"check= cannot be called: 64(.|\n)*pattern swiglu"):
        fxfuse.pattern(replacement=operators.packed_swiglu, check=64)(swiglu)  # type: ignore[arg-type]
    with pytest.raises(FxfuseError, match=r"decomposition= cannot be called(.|\n)*pattern swiglu"):
        fxfuse.pattern(replacement=operators.packed_swiglu, decomposition=1)(swiglu)  # type: ignore[arg-type]
    for replacement in (swiglu, torch.ops.aten.gelu, torch.ops.fxfuse.rms_norm):
        with pytest.raises(FxfuseError, match="of an operator of your own"):
            fxfuse.pattern(replacement=replacement, onnx=operators.PackedSwiGLU)(swiglu)


class Early(nn.Module):
    """The sum is read before the norm is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(16)), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        h = x + residual
        mean = h.mean(-1, keepdim=True)
        doubled = torch.tanh(h) * 2
        variance = (h - mean).square().mean(-1, keepdim=True)
        y = (h - mean) / torch.sqrt(variance + 1e-5) * self.weight + self.bias
        return y + doubled


class Circular(Early):
    """What the norm is multiplied by is computed of the sum: one operator cannot give both."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        h = x + residual
        weight = torch.tanh(h).mean((0, 1))
        return F.layer_norm(h, (16,), weight, self.bias) + h


def test_what_reads_a_result_early_is_computed_after_it() -> None:
    model = Early().eval()
    program = fxfuse.fuse(captured(model, 2), patterns=[fxfuse.pattern(replacement=operators.add_layer_norm)(norm)])
    assert fxfuse.report(program).counts == {"norm": 1}
    assert [str(n.target) for n in program.graph.nodes].count("aten.add.Tensor") == 1  # the last one
    given = inputs(2, 3, 7)
    torch.testing.assert_close(program.module()(*given), model(*given), rtol=2e-5, atol=2e-5)


def test_a_result_that_an_input_is_made_of_stays_beside_it() -> None:
    model = Circular().eval()
    program = fxfuse.fuse(captured(model, 2), patterns=[fxfuse.pattern(replacement=operators.add_layer_norm)(norm)])
    program.graph.lint()
    given = inputs(2, 3, 7)
    torch.testing.assert_close(program.module()(*given), model(*given), rtol=2e-5, atol=2e-5)
