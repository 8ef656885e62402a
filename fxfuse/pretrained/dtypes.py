"""The type in which a checkpoint is exported: one that the runtime has kernels for, whatever it was stored in."""

from __future__ import annotations

from typing import Any

import torch

from fxfuse.errors import FxfuseError

CPU_DTYPES = (torch.float32, torch.float16)
"""The types for which ONNX Runtime's CPU provider has kernels of Attention and RMSNormalization."""

NO_BFLOAT16 = (
    "bfloat16 does not run in ONNX Runtime's CPU provider, nor in fxfuse.runtime.Session: it takes a runtime "
    "that has bfloat16 kernels, on a GPU"
)
FOR_A_CPU = "; for a CPU pass --dtype float32 or --dtype float16"


def dtype_for_cpu(config: Any, asked: torch.dtype | None) -> tuple[torch.dtype, str | None]:
    """The type to load a checkpoint in, and what its user should know about it.

    Args:
        config: of transformers; its `dtype` is what the checkpoint was saved in.
        asked: what the caller wants; None: the checkpoint's own where the CPU provider runs it, or else float32.
    """
    stored = getattr(config, "dtype", None)
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    if asked is not None:
        return asked, None
    if stored in CPU_DTYPES:
        return stored, None
    if stored is None:
        return torch.float32, "written in float32: config.json does not say what the weights are in"
    name = str(stored).removeprefix("torch.")
    return torch.float32, (
        f"written in float32: the checkpoint is in {name}, for which ONNX Runtime's CPU provider has no kernels; "
        "--dtype float16 takes half the space"
    )


def check_dtype(dtype: torch.dtype | None, package: str | None) -> None:
    """Refuse a type that the runtime of this kind of package cannot run.

    Raises:
        FxfuseError: bfloat16 for onnxruntime-genai, whose configuration names the CPU.
    """
    if package == "genai" and dtype == torch.bfloat16:
        raise FxfuseError(
            "a package for onnxruntime-genai runs on the CPU, where ONNX Runtime has no bfloat16 attention",
            where="--dtype bfloat16 --package genai",
            hint="--dtype float32 or --dtype float16",
        )
