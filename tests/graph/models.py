"""Small models whose programs have blocks: autocast and grad modes, one within the other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

Mode = Callable[[], AbstractContextManager[Any]]


def off() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", enabled=False)


def elsewhere() -> AbstractContextManager[Any]:
    return torch.autocast("cuda", enabled=False)


def half() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


class Layer(nn.Module):
    """Norm, rotation and attention, ``[B, H, S, 16]``, within any number of modes."""

    def __init__(self, *modes: Mode) -> None:
        super().__init__()
        self.modes = modes
        self.scale = nn.Parameter(torch.rand(16) + 0.5)
        angles = torch.outer(torch.arange(32.0), 10000 ** (-torch.arange(0, 16, 2) / 16))
        self.register_buffer("cos", torch.cat([angles.cos()] * 2, -1), persistent=False)
        self.register_buffer("sin", torch.cat([angles.sin()] * 2, -1), persistent=False)

    def rotated(self, x: Tensor) -> Tensor:
        length = x.shape[2]
        first, second = x.chunk(2, -1)
        return x * self.cos[:length] + torch.cat([-second, first], -1) * self.sin[:length]

    def inner(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (self.rotated(F.rms_norm(t, (16,), self.scale, 1e-6)) for t in (q, k))
        return ((q @ k.transpose(-1, -2)) * 0.25).softmax(-1) @ v

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with ExitStack() as stack:
            for mode in self.modes:
                stack.enter_context(mode())
            y = self.inner(q, k, v)
        return y + 1


class NormOfHalf(nn.Module):
    """A float32 norm, as it is written under autocast: what it is given is half."""

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        with half():
            h = x @ w
            with off():
                n = F.rms_norm(h.float(), (16,), eps=1e-6)
            return n @ w


class AcrossTheEnd(nn.Module):
    """The root of the mean square under `no_grad`, what it divides outside: gradients go through x alone."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            root = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return x * root


class Untouched(nn.Module):
    """Two blocks that hold no operator of ours, beside a norm."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            with off():
                table = torch.outer(torch.arange(5.0), torch.arange(16.0)).cos()
            shifted = table + 1
        with half():
            y = x @ x.transpose(-1, -2)
        return F.rms_norm(x * table + shifted, (16,), eps=1e-5) + y.float().mean()


class Dead(nn.Module):
    """A write in place, a view, an output that is a view and one that is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.count.add_(1)
        y = x * 2
        y[..., :4] += 1
        with torch.no_grad():
            z = F.rms_norm(y, (16,), eps=1e-5)
            z[..., 0].mul_(2)
        return y.transpose(0, 1), z, x


def heads() -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 4, 6, 16) for _ in range(3))


def captured(module: nn.Module, *inputs: Tensor) -> ExportedProgram:
    """With batch and sequence (of four axes) free."""
    free = {0: Dim.AUTO, 2: Dim.AUTO} if inputs[0].dim() == 4 else {0: Dim.AUTO}
    axes = tuple(free if t.dim() == inputs[0].dim() else None for t in inputs)
    return torch.export.export(module.eval(), inputs, dynamic_shapes=axes)
