"""Rotations as models write them; x is [B, heads, S, head_dim] but where said otherwise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.golden.case import Case

HEADS, SIZE = 2, 8


class Halves(nn.Module):
    """Rotary embedding by `rotate_half`, over tables of cos and sin that hold the angles twice: Llama of transformers.

    That both halves of a table are equal is read from the graph, so that the node is given a half of each.
    """

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        twice = torch.cat([angles, angles], -1)[:, None]
        first, second = x.chunk(2, -1)
        return x * twice.cos() + torch.cat([-second, first], -1) * twice.sin()


class Neighbours(nn.Module):
    """Elements 2i and 2i + 1 are rotated against each other: TorchTune's and Meta's order, `interleaved` in ONNX."""

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


class PartOfTheHead(nn.Module):
    """Only the first four of eight elements are rotated, as in Phi and GPT-NeoX: an attribute of the one node."""

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        turned, kept = x[..., : SIZE // 2], x[..., SIZE // 2 :]
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        first, second = turned.chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        return torch.cat([turned, kept], -1)


class ByComplexNumbers(nn.Module):
    """Pairs as complex numbers, multiplied by e^(i·angle): Meta's own code.

    The node takes real tables, so the complex table is taken apart into cos and sin.
    """

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


class ByPosition(nn.Module):
    """Rows of a table that is a buffer, picked by position ids: the lookup stays in front of the node."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(32.0), 10000.0 ** -(torch.arange(SIZE // 2) / (SIZE // 2)))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class TwoAngles(nn.Module):
    """Not a rotation: sin is that of another angle than cos is. The graph stays as it is, and the report says why."""

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        twice = torch.cat([angles, 2.0 * angles], -1)[:, None]
        first, second = x.chunk(2, -1)
        return x * twice.cos() + torch.cat([-second, first], -1) * twice.sin()


X, ANGLES = torch.randn(2, HEADS, 5, SIZE), torch.randn(2, 5, SIZE // 2)
SIZES = ({0: "B", 2: "S"}, {0: "B", 1: "S"})
CASES = {
    "halves": Case(Halves(), (X, ANGLES), SIZES),
    "neighbours": Case(Neighbours(), (X, ANGLES), SIZES),
    "part_of_the_head": Case(PartOfTheHead(), (X, ANGLES[..., :2]), SIZES),
    "by_complex_numbers": Case(ByComplexNumbers(), (X, ANGLES), SIZES),
    "by_position": Case(ByPosition(), (X, torch.arange(10).view(2, 5)), SIZES),
    "two_angles": Case(TwoAngles(), (X, ANGLES), SIZES),
}
