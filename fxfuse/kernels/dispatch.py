"""Which kernel an operator runs on CUDA, and how torch.compile comes to see it.

    eager           the dispatcher's CUDA implementation launches the kernel (`fxfuse.ops.switch` can say otherwise)
    torch.compile   AOTAutograd records the launch itself, so that Inductor compiles it into its graph
    torch.export    the operator stays an operator

Where no kernel serves (no Triton, arguments that the kernel does not take), the composite does. Attention takes
PyTorch's SDPA where that has a fused kernel and computes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxfuse.kernels import interpreting, missing
from fxfuse.ops.registry import OPS
from fxfuse.ops.switch import decline, kernels_forced, kernels_wanted
from fxfuse.torch_seams import FakeTensor, FunctionalTensor, FunctionalTensorMode, keeps_triton_operators

Function = Callable[..., Any]
Choice = Callable[..., "Function | str"]
"""Takes the operator's arguments; gives the function to call with them, or why there is none but the composite."""


def serve(name: str, choose: Choice, composite: Function) -> None:
    """Registers what `fxfuse::name` runs on CUDA, and where `use_kernels` says so on the CPU."""

    def eager(*args: Any, **kwargs: Any) -> Any:
        device = _device(args)
        if not kernels_wanted(device):
            return composite(*args, **kwargs)
        function = missing(device) or choose(*args, **kwargs)
        if isinstance(function, str):
            decline(name, function)
            return composite(*args, **kwargs)
        from fxfuse.kernels.launch import device_of

        with device_of(device):
            return function(*args, **kwargs)

    for key in ("CPU", "CUDA"):
        torch.library.impl(f"fxfuse::{name}", key, eager)
    register_traced(name, choose)


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
        from fxfuse.kernels.calls import BACKWARD, KERNELS

        found = KERNELS.get(name) or BACKWARD[name]
        return found.unsupported(*args, **kwargs) or found.function

    return choose


def attention(count: int, name: str) -> Choice:
    """SDPA where it has a fused kernel, else ours."""
    from fxfuse.ops.attention import checked, composite
    from fxfuse.ops.attention_arguments import Attributes, Inputs
    from fxfuse.ops.attention_math import problem, split_heads
    from fxfuse.ops.attention_sdpa import has_fused_kernel

    def choose(*inputs: Tensor | None, **attributes: Any) -> Function | str:
        i, a = Inputs(*inputs), Attributes(**attributes)  # type: ignore[arg-type]
        sizes = checked(i, a, count)
        p = problem(i, a, sizes, split_heads(i.K, a.kv_num_heads), split_heads(i.V, a.kv_num_heads))
        if not kernels_forced() and has_fused_kernel(p, a, sizes.T):
            return composite(count)
        return kernel(name)(*inputs, **attributes)

    return choose


def _device(args: tuple[Any, ...]) -> torch.device:
    return next((arg.device for arg in args if isinstance(arg, torch.Tensor)), torch.device("cpu"))


def register() -> None:
    """Registers every kernel with its operator."""
    composites = {op.overload.name().removeprefix("fxfuse::"): op.composite for op in OPS.values()}
    for name in ("rms_norm", "rotary_embedding", "tensor_scatter"):
        serve(name, kernel(name), composites[name])
    for name, count in (("attention", 1), ("attention_with_present", 3)):
        serve(name, attention(count, name), composites[name])
    from fxfuse.ops import attention_backward, rms_norm, rotary_embedding

    serve("rms_norm_backward", kernel("rms_norm_backward"), rms_norm.composite_backward)
    serve("rotary_embedding_backward", kernel("rotary_embedding_backward"), rotary_embedding.composite_backward)
    serve("attention_backward", kernel("attention_backward"), attention_backward.composite)
