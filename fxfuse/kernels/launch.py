"""What launching a kernel takes: which Triton, which device, how tensors are laid out. Needs no Triton itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch

Layout = tuple[list[int], list[list[int]]]


_RECORDED: ContextVar[bool] = ContextVar("recorded", default=False)


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Within it kernels are not launched: their launches are recorded into the graph that is being traced."""
    token = _RECORDED.set(True)
    try:
        yield
    finally:
        _RECORDED.reset(token)


def wrapped(kernel: Any) -> Any:
    """What to launch in place of `kernel`; itself, unless a graph is being traced (see `recording`)."""
    return torch.library.wrap_triton(kernel) if _RECORDED.get() else kernel


def interpreted() -> bool:
    """Do the kernels run in Triton's interpreter?"""
    from fxfuse.kernels.language import INTERPRETED

    return bool(INTERPRETED.value)


def device_of(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device the current one: Triton launches on the current device and its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def processors(device: torch.device) -> int:
    """How many multiprocessors there are to keep busy; one in the interpreter, where each program costs time."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program can have."""
    if device.type == "cuda" and torch.cuda.is_available():
        properties: Any = torch.cuda.get_device_properties(device)
        return int(properties.shared_memory_per_block_optin)
    return 99 << 10


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of a torch type."""
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))


def math_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """What arithmetic on these types is done in: float64 where one is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n; 1 for 0."""
    return 1 << max(int(n) - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def collapse(sizes: Sequence[int], strides: Sequence[Sequence[int]]) -> Layout:
    """As few dims as describe the same elements, for tensors of one shape: [2, 3, 8] contiguous is [48] or [1].

    Args:
        sizes: of all the tensors.
        strides: each tensor's.
    """
    out_sizes: list[int] = []
    out_strides: list[list[int]] = [[] for _ in strides]
    for dim, size in enumerate(sizes):
        if size == 1:
            continue
        here = [s[dim] for s in strides]
        if out_sizes and all(out[-1] == stride * size for out, stride in zip(out_strides, here, strict=True)):
            out_sizes[-1] *= size
            for out, stride in zip(out_strides, here, strict=True):
                out[-1] = stride
        else:
            out_sizes.append(size)
            for out, stride in zip(out_strides, here, strict=True):
                out.append(stride)
    return out_sizes, out_strides


def padded(layout: Layout, dims: int) -> Layout | None:
    """The layout with exactly `dims` dims, ones at the end, where Triton folds them; None if it has more."""
    sizes, strides = layout
    missing = dims - len(sizes)
    if missing < 0:
        return None
    return sizes + [1] * missing, [s + [0] * missing for s in strides]
