"""Breaks of a plain function: a user's example is run with every operator that it calls looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxfuse.proof.analytic import analytic_call
from fxfuse.proof.breaks import Breaks
from fxfuse.proof.pieces import Call
from fxfuse.torch_seams import TorchDispatchMode, schema_of


def recorded(function: Callable[..., Any], inputs: list[Tensor], breaks: Breaks) -> None:
    """Run the function and note which pieces of its breaks ran; the n-th operator that it calls is the n-th break."""
    with torch.no_grad(), _Watch(breaks):
        function(*inputs)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, breaks: Breaks) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.breaks = breaks
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        value = func(*args, **kwargs)
        name = schema_of(func).name.split("::")[1]
        self.count += 1
        if not analytic_call(name, schema_of(func), args, kwargs):
            self.breaks.note(("example", self.count), name, Call(None, args, kwargs, value, schema_of(func)))
        return value
