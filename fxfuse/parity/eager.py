"""Parity of an exported model with eager PyTorch, at several shapes, one copy of the weights at a time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from fxfuse.errors import FxfuseError
from fxfuse.parity import Result, ShapeCase, check_onnx, compare, open_session, wide_outputs, working_dtype
from fxfuse.parity.wide import tensors_of


@dataclass(frozen=True)
class Check:
    """One comparison with eager."""

    backend: str
    """``"PyTorch, fused"`` or ``"ONNX Runtime"``."""
    case: str
    sizes: str
    result: Result

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Expected:
    """What the original computes for one case: in its own dtype, and without its rounding."""

    case: ShapeCase
    dtype: torch.dtype
    eager: list[torch.Tensor]
    wide: list[torch.Tensor]

    def check(self, backend: str, outputs: list[torch.Tensor]) -> Check:
        return Check(backend, self.case.label, self.case.sizes, compare(self.eager, outputs, self.wide, self.dtype))


def eager_outputs(model: torch.nn.Module | ExportedProgram, cases: list[ShapeCase]) -> list[list[torch.Tensor]]:
    """Runs the original.

    Raises:
        FxfuseError: it does not run.
    """
    module = model.module(check_guards=False) if isinstance(model, ExportedProgram) else model
    return [tensors_of(run_original(module, case)) for case in cases]


def run_original(module: torch.nn.Module, case: ShapeCase) -> Any:
    """What the original returns.

    Raises:
        FxfuseError: it does not run at these sizes.
    """
    try:
        with torch.no_grad():
            return module(*case.args, **case.kwargs)
    except Exception as error:  # the model's own
        raise FxfuseError(
            f"the model itself does not run at {case.label}: {type(error).__name__}: {error}",
            where=f"inputs {case.sizes}",
            hint="bound the dimension in dynamic_shapes, as in Dim('sequence', max=512), if it is too long",
        ) from error


def expectations(program: ExportedProgram, cases: list[ShapeCase], eager: list[list[torch.Tensor]]) -> list[Expected]:
    """Runs the capture of the original in a wider dtype, beside what the original gave."""
    dtype = working_dtype(program)
    return [
        Expected(case, dtype, outputs, wide_outputs(program, case.args, case.kwargs))
        for case, outputs in zip(cases, eager, strict=True)
    ]


def check_fused(fused: ExportedProgram, expected: list[Expected]) -> list[Check]:
    """The fused program in PyTorch."""
    module = fused.module(check_guards=False)
    return [e.check("PyTorch, fused", _run(module, e.case)) for e in expected]


def check_model(path: Path, expected: list[Expected]) -> list[Check]:
    """The written file: the ONNX checker with full shape inference, then ONNX Runtime.

    A bfloat16 model runs as its float32 twin: ONNX Runtime's CPU provider has no kernels for bfloat16.

    Raises:
        FxfuseError: the checker or ONNX Runtime refuses the file, or onnxruntime is not installed.
    """
    check_onnx(path)
    name, session = open_session(path, expected[0].dtype)
    return [e.check(name, session(*e.case.inputs)) for e in expected]


def _run(module: torch.nn.Module, case: ShapeCase) -> list[torch.Tensor]:
    with torch.no_grad():
        return tensors_of(module(*case.args, **case.kwargs))
