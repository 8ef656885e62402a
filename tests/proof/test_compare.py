"""Are two results the same? Each element against what its own arithmetic may lose."""

from __future__ import annotations

import math

import pytest
import torch

from fxfuse.proof.compare import NOISE, Refused, moved, same
from fxfuse.proof.evaluate import generator


def nothing() -> torch.Tensor:
    return torch.zeros(3, dtype=torch.float64)


def values(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_a_small_element_is_not_excused_by_a_large_one() -> None:
    expected = values(1e6, 1.0, 1e-9)
    assert same(expected, expected.clone(), nothing) == 0.0
    with pytest.raises(Refused, match="differs in float64"):
        same(expected, values(1e6, 1.0, 2e-9), nothing)


def test_rounding_is_excused_by_as_much_as_the_element_moves() -> None:
    expected = values(1.0, 1.0, 1.0)
    loss = values(0.0, NOISE, NOISE * 1e6)
    off = torch.finfo(torch.float64).eps * 1e6
    assert same(expected, expected + values(0, 0, off), lambda: loss) <= 1
    with pytest.raises(Refused):
        same(expected, expected + values(0, off, 0), lambda: loss)


def test_what_is_not_finite_is_alike() -> None:
    expected = values(math.nan, math.inf, -math.inf)
    assert same(expected, expected.clone(), nothing) == 0.0
    for actual in (values(0, math.inf, -math.inf), values(math.nan, -math.inf, -math.inf), values(math.nan, 1e300, 0)):
        with pytest.raises(Refused, match="where the region gives"):
            same(expected, actual, nothing)
    with pytest.raises(Refused):
        same(values(1, 2, 3), values(1, math.nan, 3), nothing)


def test_elements_that_are_free_are_not_compared() -> None:
    expected, free = values(math.nan, 1, 2), torch.tensor([True, False, False])
    assert same(expected, values(0, 1, 2), nothing, free=free) == 0.0
    with pytest.raises(Refused):
        same(expected, values(0, 1, 3), nothing, free=free)


def test_whole_numbers_are_equal_or_not() -> None:
    assert same(torch.tensor([1, 2]), torch.tensor([1, 2]), nothing) == 0.0
    with pytest.raises(Refused, match="gives 3 where the region gives 2"):
        same(torch.tensor([1, 2]), torch.tensor([1, 3]), nothing)


def test_complex_numbers_are_their_parts() -> None:
    expected = torch.complex(values(1, 2, 3), values(1e-9, 0, 0))
    assert same(expected, expected.clone(), nothing) == 0.0
    with pytest.raises(Refused):
        same(expected, torch.complex(values(1, 2, 3), values(2e-9, 0, 0)), nothing)


def test_how_far_a_difference_of_near_numbers_moves() -> None:
    """x + 1e8 - 1e8 loses what x has below 1e8's last place; x does not."""
    x = values(1.0, 2.0, 3.0)

    def noisy(sample: int) -> list[torch.Tensor]:
        off = 1 + NOISE * (2 * torch.rand(3, dtype=torch.float64, generator=generator(sample)) - 1)
        return [(x + 1e8) * off - 1e8, x * off]

    far, near = moved(noisy, [(x + 1e8) - 1e8, x])
    assert bool((far > near * 1e6).all())
