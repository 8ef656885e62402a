"""Which kernel an operator runs on CUDA, and how torch.compile comes to see it.

    eager           the dispatcher's CUDA implementation launches the kernel (`fxfuse.kernels.switch` can say otherwise)
    torch.compile   AOTAutograd records the launch itself, so that Inductor compiles it into its graph
    torch.export    the operator stays an operator

Where no kernel serves (no Triton, arguments that the kernel does not take), the composite does. An operator may choose
something faster than its kernel for some calls, as Attention does where PyTorch's SDPA computes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxfuse.kernels import interpreting, missing
from fxfuse.kernels.switch import decline, kernels_wanted
from fxfuse.kernels.table import enter, kernels
from fxfuse.torch_seams import FakeTensor, FunctionalTensor, FunctionalTensorMode, keeps_triton_operators

Function = Callable[..., Any]
Choice = Callable[..., "Function | str"]
"""Takes the operator's arguments; gives the function to call with them, or why there is none but the composite."""


def serve(name: str, module: str, composite: Function, choose: Choice | None = None, *, backward: bool = False) -> None:
    """Registers what `fxfuse::name` runs on CUDA, and where `use_kernels` says so on the CPU.

    Args:
        name: of the operator, or of the backward pass.
        module: whose `KERNELS` has the kernel.
        composite: what runs where no kernel does.
        choose: gives what to call for these arguments; None means the kernel, wherever it takes them.
        backward: is it a backward pass?
    """
    enter(name, module, backward=backward)
    chosen = choose or kernel(name)

    def eager(*args: Any, **kwargs: Any) -> Any:
        device = _device(args)
        if not kernels_wanted(device):
            return composite(*args, **kwargs)
        function = missing(device) or chosen(*args, **kwargs)
        if isinstance(function, str):
            decline(name, function)
            return composite(*args, **kwargs)
        from fxfuse.kernels.launch import device_of

        with device_of(device):
            return function(*args, **kwargs)

    for key in ("CPU", "CUDA"):
        torch.library.impl(f"fxfuse::{name}", key, eager)
    register_traced(name, chosen)


def register_traced(name: str, choose: Choice) -> None:
    """Makes torch.compile see through the operator, as torch.library.triton_op does for an operator of its own."""
    known = (torch.Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)

    def traced(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        kwargs = kwargs or {}
        if any(t not in known for t in types):
            return NotImplemented
        device = _device(args)
        opaque = keeps_triton_operators() or interpreting()
        if not opaque and device.type == "cuda" and kernels_wanted(device) and not missing(device):
            with mode:
                function = choose(*args, **kwargs)
                if not isinstance(function, str):
                    from fxfuse.kernels.launch import recording

                    with recording():
                        return function(*args, **kwargs)
        return mode.__torch_dispatch__(op, types, args, kwargs)

    torch.library.register_torch_dispatch(f"fxfuse::{name}", FunctionalTensorMode, traced)


def kernel(name: str) -> Choice:
    """The operator's kernel, where it takes the arguments."""

    def choose(*args: Any, **kwargs: Any) -> Function | str:
        found = kernels()[name]
        return found.unsupported(*args, **kwargs) or found.function

    return choose


def _device(args: tuple[Any, ...]) -> torch.device:
    return next((arg.device for arg in args if isinstance(arg, torch.Tensor)), torch.device("cpu"))
