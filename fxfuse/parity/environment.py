"""What a measurement was made on and with: without it no figure means anything."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shutil
import subprocess
from typing import Any

import torch

from fxfuse import kernels

PACKAGES = ("fxfuse", "torch", "triton", "onnx", "onnxruntime", "numpy", "liger-kernel")


def environment(device: torch.device) -> dict[str, Any]:
    """The device, its clocks, the versions, the date; for JSON."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": describe(device),
        "triton": kernels.missing(device) or ("interpreted" if kernels.interpreting() else "compiled"),
        "versions": {name: version(name) for name in PACKAGES if version(name)},
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "clocks": clocks() if device.type == "cuda" else None,
    }


def describe(device: torch.device) -> str:
    """``"NVIDIA H100 80GB HBM3 (sm_90)"``, or the processor's name."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name} (sm_{properties.major}{properties.minor})"
    return f"CPU ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


def version(package: str) -> str | None:
    """The installed version of a package; None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def clocks() -> str | None:
    """The GPU's clocks and driver as nvidia-smi tells them; None where it is not there."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    command = [tool, f"--query-gpu={fields}", "--format=csv"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return answer.stdout.strip() or None
