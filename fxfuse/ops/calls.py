"""Calls of an operator with drawn inputs: what its `parity.py` makes, a matrix of type × layout × shape × option.

Sizes are 1, odd, powers of two, one more than a block, and long enough for several blocks of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Axes = Mapping[str, tuple[Any, ...]]

LAYOUTS = ("contiguous", "transposed", "strided", "sliced", "offset")
HEADS_LAST = ("3d", "3d sliced", "4d strided", "4d transposed")


@dataclass(frozen=True)
class Call:
    """One call of an operator."""

    op: str
    """Its name in `torch.ops.fxfuse`."""
    point: dict[str, str]
    """Where in the matrix it stands: ``{"dtype": "float16", "layout": "strided", "shape": "3×65", ...}``."""
    args: tuple[Tensor | None, ...] = field(repr=False)
    kwargs: dict[str, Any]
    dtype: torch.dtype
    """What it rounds to."""

    def __str__(self) -> str:
        return f"{self.op}[{', '.join(self.point.values())}]"

    def on(self, device: torch.device) -> Call:
        """The same on another device, the tensors laid out as before."""
        if device.type == "cpu":
            return self
        args = tuple(None if arg is None else moved(arg, device) for arg in self.args)
        return Call(self.op, self.point, args, self.kwargs, self.dtype)


Build = Callable[..., "Call | None"]
"""Takes a value of every axis and a `Draw`; None where the combination means nothing."""


class Draw:
    """Random tensors in the layouts that models have."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype)

    def bools(self, *shape: int) -> Tensor:
        """Three of five are true; the first row hides everything."""
        mask = torch.rand(shape, generator=self.generator) > 0.4
        mask.reshape(-1, shape[-1])[0] = False
        return mask

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 from low to high, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def laid_out(self, layout: str, *shape: int) -> Tensor:
        """``contiguous``; ``transposed``: dims 1 and 2 swapped in memory; ``strided``: every second element;
        ``sliced``: part of a wider tensor; ``offset``: not at the start of its memory."""
        if layout == "transposed":
            return self.normal(shape[0], shape[2], shape[1], *shape[3:]).transpose(1, 2)
        if layout == "strided":
            return self.normal(*shape[:-1], 2 * shape[-1])[..., ::2]
        if layout == "sliced":
            return self.normal(*shape[:-1], shape[-1] + 3)[..., : shape[-1]]
        if layout == "offset":
            return self.normal(shape[0] + 1, *shape[1:])[1:]
        assert layout == "contiguous"
        return self.normal(*shape)

    def heads(self, layout: str, B: int, H: int, S: int, D: int) -> Tensor:
        """[B, S, H*D] or [B, H, S, D] in one of HEADS_LAST."""
        rank, _, how = layout.partition(" ")
        shape = (B, S, H * D) if rank == "3d" else (B, H, S, D)
        return self.laid_out(how or "contiguous", *shape)


@dataclass(frozen=True)
class Matrix:
    """What one operator is compared over: values of the axes, and how a call is made of one of each."""

    axes: Axes
    """Beside those of dtype."""
    build: Build
    differentiable: bool = True
    """Are gradients to be compared as well?"""
    exactly: Mapping[str, Any] = field(default_factory=dict)
    """Arguments by name that keep a call in float64 from rounding to a narrower type."""
    refused: Callable[[Call], str | None] = lambda call: None
    """What the CPU provider of ONNX Runtime 1.32 is known not to do of a call, as seen in runs of the matrix."""
    attributes: Callable[[Call], dict[str, Any]] = lambda call: dict(call.kwargs)
    """Those of the ONNX node, where they are not all the arguments by name."""


def labels(**values: Any) -> dict[str, str]:
    """Values of the axes as text: dtypes by their names, sizes as ``3×65``."""

    def label(value: Any) -> str:
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        return "×".join(map(str, value)) if isinstance(value, tuple) else str(value)

    return {name: label(value) for name, value in values.items()}


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on another device with its strides and its offset: the memory that it lies in goes along."""
    if tensor.numel() == 0:
        return tensor.to(device)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = tensor.as_strided((tensor.storage_offset() + last + 1,), (1,), 0).to(device)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
