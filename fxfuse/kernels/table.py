"""Which operators have a Triton kernel, and in which module each is; the modules are imported when first asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple


class Kernel(NamedTuple):
    """One operator's kernel, or that of a backward pass."""

    unsupported: Callable[..., str | None]
    """Checks the arguments as the operator does, then says why the kernel does not take them, or None."""
    function: Callable[..., Any]
    """What the operator gives, for arguments that were checked."""


_FORWARD: dict[str, str] = {}
_BACKWARD: dict[str, str] = {}
"""Modules by the operator's name: each has a dict `KERNELS` of `Kernel`s by these names."""


def enter(name: str, module: str, *, backward: bool = False) -> None:
    """Says that `KERNELS` of `module` has the kernel of `fxfuse::name`, which is perhaps a backward pass."""
    (_BACKWARD if backward else _FORWARD)[name] = module


def names() -> tuple[str, ...]:
    """The operators that have a kernel."""
    return tuple(_FORWARD)


@cache
def kernels() -> dict[str, Kernel]:
    """The kernels by the operator's name, taking what the operator takes; backward passes too. Imports Triton."""
    return {name: import_module(module).KERNELS[name] for name, module in (_FORWARD | _BACKWARD).items()}
