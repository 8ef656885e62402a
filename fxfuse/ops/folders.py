"""The operators' folders, found by their being there: `fxfuse/ops/<operator>/`, in alphabetical order.

__init__.py   the schema, the composite, the gradients and the ONNX translation; importing it registers the operator
kernels       its Triton kernels, imported when the first of them runs
parity.py     the calls over which its implementations are compared
repair.py     rewrites for ONNX files of others in which it does not run
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType


def folders() -> list[str]:
    """The folders' names: ``["attention", "dequantize_linear", ...]``."""
    here = str(Path(__file__).parent)
    return sorted(module.name for module in pkgutil.iter_modules([here]) if module.ispkg)


def load() -> None:
    """Registers every operator."""
    for name in folders():
        import_module(f"fxfuse.ops.{name}")


def parts(part: str) -> Iterator[ModuleType]:
    """The module of this name (``"parity"``) of every operator that has one."""
    for name in folders():
        module = f"fxfuse.ops.{name}.{part}"
        if find_spec(module) is not None:
            yield import_module(module)
