"""Many tensors, in any order, and regions of many nodes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.recognise.by_example.binding import Binder
from fxfuse.recognise.catalogue import catalogue


def mixed(a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor, g: Tensor, h: Tensor) -> Tensor:
    """Eight tensors of one shape; c and d may change places, if e and f do too."""
    return torch.tanh(a) * b + c * e + d * f + torch.sigmoid(g - h)


def layered(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor, scale: Tensor) -> Tensor:
    """Eight tensors of different shapes."""
    return (torch.tanh(torch.tanh(x @ w1 + b1) @ w2 + b2) @ w3 + b3) * scale


def alike(a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor, g: Tensor, h: Tensor, i: Tensor) -> Tensor:
    return a + b + c + d + e + f + g + h + i


SHAPES: dict[Callable[..., Tensor], list[tuple[int, ...]]] = {
    mixed: [(3, 4)] * 8,
    layered: [(3, 4), (4, 5), (5,), (5, 6), (6,), (6, 7), (7,), (3, 1)],
    alike: [(3, 4)] * 9,
}


@pytest.mark.parametrize("function", SHAPES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_the_order_is_asked_and_not_tried(function: Callable[..., Tensor], seed: int) -> None:
    """Of 40320 orders, and more, the right one is the first that is given."""
    shapes = SHAPES[function]
    order = list(range(len(shapes)))
    random.Random(seed).shuffle(order)  # the region's i-th input is the order[i]-th parameter
    runs = 0

    def example(*tensors: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return function(*tensors)

    def region(tensors: Any) -> list[Tensor]:
        return [function(*(tensors[order.index(p)] for p in range(len(order))))]

    def draw(number: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(number + 1000)
        return [torch.randn(shapes[p], generator=generator, dtype=torch.float64) for p in order]

    found = next(Binder(region, example, draw).orders())
    values = draw(77)
    torch.testing.assert_close(function(*(values[i] for i in found.inputs)), region(values)[0])
    assert runs < 250


@pytest.fixture
def registered() -> Iterator[list[Any]]:
    found: list[Any] = []
    yield found
    for pattern in found:
        pattern.unregister()


class Mixed(nn.Module):
    def forward(self, p: Tensor, q: Tensor, r: Tensor, s: Tensor, t: Tensor, u: Tensor, v: Tensor, w: Tensor) -> Tensor:
        gate = 1 / (1 + torch.exp(v - s))
        return (r * w + gate) + (u * torch.tanh(q) + p * t)


def test_eight_tensors_of_a_model(registered: list[Any]) -> None:
    registered.append(fxfuse.pattern(replacement=mixed)(mixed))
    inputs = tuple(torch.randn(3, 4) for _ in range(8))
    fused = fxfuse.fuse(torch.export.export(Mixed(), inputs))
    (entry,) = fxfuse.report(fused).fused("mixed")
    assert [entry.parameters[name] for name in "abgh"] == ["q", "u", "s", "v"]
    torch.testing.assert_close(fused.module()(*inputs), Mixed()(*inputs))


class Long(nn.Module):
    """A polynomial of degree 40 by Horner's rule: 80 nodes."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x
        for n in range(40):
            h = h * x + y / (n + 1)
        return torch.relu(h).sum()


def test_a_region_of_a_hundred_nodes(registered: list[Any]) -> None:
    @fxfuse.pattern(replacement=lambda x, y: horner(x, y))
    def horner(x: Tensor, y: Tensor) -> Tensor:
        total = x**41
        for n in range(40):
            total = total + x ** (39 - n) * y / (n + 1)
        return total

    registered.append(horner)
    inputs = (torch.rand(3, 4), torch.rand(3, 4))
    report = fxfuse.report(fxfuse.fuse(torch.export.export(Long(), inputs), patterns=[horner]))
    (entry,) = report.fused("horner")
    assert len(entry.nodes) == 120


class Deep(nn.Module):
    """Every value is read again and again: there are more regions than can be asked."""

    def forward(self, x: Tensor) -> Tensor:
        values = [x, x.sin(), x.cos(), x.tanh()]
        for _ in range(12):
            values.append(values[-1] * values[-2] + values[-3] * values[-4])
        return values[-1]


def test_a_search_that_ends_at_its_bound_says_so(registered: list[Any]) -> None:
    @fxfuse.pattern(replacement=lambda a, b, c: a - b - c)
    def less(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return a - b - c

    registered.append(less)
    report = fxfuse.report(fxfuse.fuse(torch.export.export(Deep(), (torch.randn(3),)), patterns=[less]))
    (entry,) = report.near_misses("less")
    assert "ended at its bound of" in str(entry.reason)


def test_unregister() -> None:
    pattern = fxfuse.pattern(replacement=mixed)(mixed)
    other = fxfuse.pattern(replacement=alike)(alike)
    pattern.unregister()
    assert pattern not in catalogue() and other in catalogue()
    other.unregister()
    assert other not in catalogue()
