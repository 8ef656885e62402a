"""Whether operators run their Triton kernels: on CUDA they do, and nowhere else, unless somebody says otherwise.

with use_kernels("always"):     on the CPU too, in Triton's interpreter: how kernels are tested without a GPU
with use_kernels("never"):      the composites on CUDA too: what kernels are compared with
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Mode = Literal["auto", "always", "never"]

# Not a context variable: a backward pass on CUDA runs in threads of autograd's own.
_mode: Mode = "auto"
_declined: list[tuple[str, str]] = []


@contextmanager
def use_kernels(mode: Mode) -> Iterator[list[tuple[str, str]]]:
    """Says for the whole process whether operators run their kernels.

    Yields:
        A list that grows while the block runs: the operators that ran no kernel although one was wanted, and why.
    """
    global _mode, _declined
    before = _mode, _declined
    _mode, _declined = mode, []
    try:
        yield _declined
    finally:
        _mode, _declined = before


def kernels_wanted(device: torch.device) -> bool:
    """Is an operator on this device to run its kernel, if it has one for the call?"""
    return _mode == "always" or (_mode == "auto" and device.type == "cuda")


def kernels_forced() -> bool:
    """Is the kernel to run even where something of PyTorch's would be faster?"""
    return _mode == "always"


def decline(name: str, why: str) -> None:
    """Notes that an operator runs no kernel although one was wanted."""
    if _mode == "always":
        _declined.append((name, why))
