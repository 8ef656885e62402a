"""The matrix that operators are compared over: type × layout × shape × option, as calls with drawn inputs.

calls("attention", "all")       every combination that means anything
calls("attention", "pairs")     the fewest (about) in which every two values of two axes meet
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fxfuse.errors import FxfuseError

Sample = Literal["pairs", "all"]
Axes = Mapping[str, tuple[Any, ...]]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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


_MATRICES: dict[str, tuple[Axes, Build]] = {}


def matrix(op: str, **axes: tuple[Any, ...]) -> Callable[[Build], Build]:
    """Enters a function that builds the calls of `op` from values of these axes, beside those of dtype."""

    def enter(build: Build) -> Build:
        _MATRICES[op] = {"dtype": DTYPES, **axes}, build
        return build

    return enter


def operators() -> tuple[str, ...]:
    """The operators that have a matrix."""
    import fxfuse.parity.calls  # noqa: F401  (enters them)

    return tuple(_MATRICES)


def calls(op: str, sample: Sample = "pairs") -> Iterator[Call]:
    """The calls of one operator's matrix.

    Raises:
        FxfuseError: there is no such operator.
    """
    if op not in operators():
        raise FxfuseError(f"no operator {op!r}", where="parity", hint="one of " + ", ".join(_MATRICES))
    axes, build = _MATRICES[op]
    points: list[tuple[Any, ...]] = list(itertools.product(*axes.values()))
    # As the sizes of `pairs` depend on the order, the order is always the same.
    random.Random(0).shuffle(points)
    met: set[tuple[int, Any, int, Any]] = set()
    for number, point in enumerate(points):
        pairs = {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(enumerate(map(str, point)), 2)}
        if sample == "pairs" and pairs <= met:
            continue
        values = dict(zip(axes, point, strict=True))
        call = build(**values, draw=Draw(number, values["dtype"]))
        if call is not None:
            met |= pairs
            yield call


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
