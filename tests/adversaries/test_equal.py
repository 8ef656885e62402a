"""The comparison sees what is wrong with one small element, and forgives rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from tests.adversaries.equal import Difference, difference


class Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def compared(one: Callable[..., Tensor], other: Callable[..., Tensor], *inputs: Tensor) -> Difference | None:
    shapes = (tuple({0: Dim.AUTO} for _ in inputs),)
    program = torch.export.export(Function(one), inputs, dynamic_shapes=shapes)
    return difference(program, inputs, [program.module()(*inputs)], [other(*inputs)])


def norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def attention(x: Tensor) -> Tensor:
    return (x @ x.mT / 2).softmax(-1) @ x


def x(scale: float = 1.0) -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(0)) * scale


@pytest.mark.parametrize("scale", [1e-6, 1.0, 30.0, 1e6])
def test_another_order_of_evaluation_is_equal(scale: float) -> None:
    def other_norm(x: Tensor) -> Tensor:
        return x / (x.square().sum(-1, keepdim=True) * 0.25 + 1e-6).sqrt()

    def other_attention(x: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*(x[None] for _ in range(3)))[0]

    assert compared(norm, other_norm, x(scale)) is None
    assert compared(attention, other_attention, x(scale)) is None
    assert compared(lambda x: x - x.mean(0), lambda x: x - x.sum(0) / 5, x(scale)) is None


def test_a_small_element_beside_a_large_one_counts() -> None:
    values = x()
    values[:, 0] *= 1e6
    wrong = compared(norm, lambda x: norm(x) + torch.tensor([0.0, 0.0, 1e-9, 0.0]), values)
    assert wrong is not None and wrong.place[-1] == 2 and wrong.share == 0.25


@pytest.mark.parametrize("bound", [3.0, 1e3, 1e5])
def test_a_bound_that_one_element_meets(bound: float) -> None:
    values = x()
    values[2, 1] = 1.001 * bound
    wrong = compared(lambda x: x.clamp(max=bound) * 2, lambda x: x * 2, values)
    assert wrong is not None and wrong.place == (2, 1) and wrong.share == 1 / 20


def test_a_cast_that_is_dropped() -> None:
    assert compared(lambda x: norm(x.bfloat16().float()), norm, x()) is not None
    assert (
        compared(lambda x: norm(x).bfloat16().float(), lambda x: (norm(x) * (1 + 1e-7)).bfloat16().float(), x()) is None
    )


def test_rows_that_see_no_key() -> None:
    """Filled with one number they average; that is an answer. What is nan is none."""

    def filled(x: Tensor, fill: float) -> Tensor:
        return (x @ x.mT).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(), fill).softmax(-1) @ x

    wrong = compared(lambda x: filled(x, -1e9), lambda x: filled(x, -torch.inf).nan_to_num(), x())
    assert wrong is not None and wrong.place[0] == 0
    assert compared(lambda x: filled(x, -torch.inf), lambda x: filled(x, -torch.inf).nan_to_num(), x()) is None


def test_there_is_no_answer_where_something_overflows() -> None:
    def gate(x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    assert compared(gate, lambda x: torch.full_like(x, 3.0), x(200.0)) is None
