"""The Triton kernels: what the operators run on CUDA, and anywhere a second implementation to check them against.

    run("rms_norm", x, w, epsilon=1e-6)     the kernel of fxfuse::rms_norm, with the operator's arguments
    missing(x.device)                       why no kernel runs there, or None
    unsupported("rms_norm", x, w)           why the kernel does not take this call, or None
    names()                                 the operators that have a kernel
    interpret()                             from now on kernels run in Triton's interpreter, on the CPU

Importing this package needs neither Triton nor a GPU. The kernels stand with their operators, in
`fxfuse/ops/<operator>/`, and are imported when the first of them runs; here is what they share.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from typing import Any

import torch

from fxfuse.errors import FxfuseError
from fxfuse.kernels.table import kernels, names

__all__ = ["interpret", "missing", "names", "run", "unsupported"]


def run(name: str, *args: Any, **kwargs: Any) -> Any:
    """What the kernel of `fxfuse::name` gives for the operator's arguments.

    Raises:
        FxfuseError: no kernel runs on the arguments' device (see `missing`), the kernel does not take this call (see
            `unsupported`), or the arguments are wrong, as the operator itself would say.
    """
    device = next((arg.device for arg in args if isinstance(arg, torch.Tensor)), torch.device("cpu"))
    why = missing(device)
    if why is not None:
        hint = "call fxfuse.kernels.interpret() first" if device.type == "cpu" else None
        raise FxfuseError(f"no Triton kernel runs here: {why}", where=name, hint=hint)
    why = unsupported(name, *args, **kwargs)
    if why is not None:
        raise FxfuseError(f"the kernel does not take this call: {why}", where=name, hint=f"use torch.ops.fxfuse.{name}")
    from fxfuse.kernels.launch import device_of

    with device_of(device):
        return kernels()[name].function(*args, **kwargs)


def unsupported(name: str, *args: Any, **kwargs: Any) -> str | None:
    """Why the kernel of `fxfuse::name` does not take this call; None if it does.

    Raises:
        FxfuseError: there is no such kernel, Triton is not installed, or the arguments do not fit the operator.
    """
    if name not in names():
        raise FxfuseError(f"{name} has no kernel", where=name, hint="one of " + ", ".join(names()))
    if not installed():
        raise FxfuseError("Triton is not installed", where=name, hint="pip install 'fxfuse[triton]'")
    return kernels()[name].unsupported(*args, **kwargs)


def missing(device: torch.device | str = "cuda") -> str | None:
    """Why no kernel can run on tensors of this device; None if kernels can."""
    kind = torch.device(device).type
    if not installed():
        return "Triton is not installed"
    if kind == "cuda" and not torch.cuda.is_available():
        return "there is no GPU"
    if kind == "cpu" and not interpreting():
        return "Triton compiles for GPUs; on the CPU it has an interpreter"
    return None if kind in ("cpu", "cuda") else f"Triton is not tried on {kind}"


def interpret() -> None:
    """Makes kernels run in Triton's interpreter, with numpy, on tensors of the CPU. Does nothing where they do so.

    Raises:
        FxfuseError: Triton is not installed, or was imported for the compiler already (torch.export does that).
    """
    if not installed():
        raise FxfuseError("Triton is not installed", hint="pip install 'fxfuse[triton]'")
    if "triton.language" in sys.modules and not interpreting():
        raise FxfuseError(
            "Triton was imported for the compiler already, and cannot be made to interpret",
            where="TRITON_INTERPRET",
            hint="call fxfuse.kernels.interpret() before anything is exported, or set TRITON_INTERPRET=1",
        )
    os.environ["TRITON_INTERPRET"] = "1"


def interpreting() -> bool:
    """Do kernels run in the interpreter, or will they when they are imported?"""
    if "triton.language" not in sys.modules:
        return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    # What was decided when Triton was imported holds for its own functions, whatever the environment says by now.
    return isinstance(tl.sum, InterpretedFunction)


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None
