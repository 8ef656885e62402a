"""Layouts are read off element numbers, and tensors are rearranged by them."""

from __future__ import annotations

import pytest
import torch

from fxfuse.patterns.attention.layouts import Reading, read_layouts
from fxfuse.patterns.attention.rearrange import rearranged

B, H, S, D = 3, 4, 5, 8
BHSD = (("n0",), ("n1",), ("s0",), ("d0",))


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


@pytest.mark.parametrize(
    ("shape", "order", "axes"),
    [
        ((B, S, H * D), (0, 2, 1, 3), (("n0",), ("s0",), ("n1", "d0"))),
        ((S, B * H, D), (1, 2, 0, 3), (("s0",), ("n0", "n1"), ("d0",))),
        ((H * B, D, S), (1, 0, 3, 2), (("n1", "n0"), ("d0",), ("s0",))),
        ((B, H, 1, S, D), (0, 1, 2, 3), (("n0",), ("n1",), (), ("s0",), ("d0",))),
    ],
)
def test_axes_are_read_and_given_back(
    shape: tuple[int, ...], order: tuple[int, ...], axes: tuple[tuple[str, ...], ...]
) -> None:
    sizes = {0: B, 1: H, 2: S, 3: D}
    inside = sorted(range(4), key=lambda k: order.index(k))  # the order of the atoms in memory
    memory = [a for axis in axes for a in axis]
    unfolded = numbers(*shape).reshape([{"n0": B, "n1": H, "s0": S, "d0": D}[a] for a in memory])
    found = unfolded.permute([memory.index(a) for a in ("n0", "n1", "s0", "d0")])
    assert found.shape == tuple(sizes[k] for k in range(4)) and len(inside) == 4
    known = Reading(numbers(B, H, S, D).reshape(B * H, S, D), (B, H, S, D), "s", "d")
    layouts = read_layouts([Reading(found.reshape(B * H, S, D), shape, "s", "d"), known])
    assert layouts is not None
    assert layouts.axes == (axes, BHSD)
    assert torch.equal(rearranged(numbers(*shape), axes, BHSD, layouts.sizes), found)
    assert torch.equal(rearranged(found, BHSD, axes, layouts.sizes), numbers(*shape))


def test_what_is_in_no_order_has_no_layout() -> None:
    shuffled = torch.randperm(B * S * D).reshape(B, S, D)
    assert read_layouts([Reading(shuffled, (B, S, D), "s", "d")]) is None


def test_a_part_of_a_tensor_has_no_layout() -> None:
    assert read_layouts([Reading(numbers(B, S, 2 * D)[..., :D], (B, S, 2 * D), "s", "d")]) is None


def test_what_is_missing_is_repeated() -> None:
    mask = torch.randn(1, H, S, 7)
    have = ((), ("n1",), ("s0",), ("t0",))
    folded = (("n0", "n1"), ("s0",), ("t0",))
    expected = mask.expand(B, H, S, 7).reshape(B * H, S, 7)
    assert torch.equal(rearranged(mask, have, folded, {"n0": B, "n1": H, "s0": S, "t0": 7}), expected)
