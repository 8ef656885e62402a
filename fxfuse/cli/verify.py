"""Parity of an exported model with eager PyTorch, at several shapes, one copy of the weights at a time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxfuse.parity import Result, ShapeCase, check_onnx, compare, open_session, wide_outputs, working_dtype


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
    """Runs the original."""
    module = model.module(check_guards=False) if isinstance(model, ExportedProgram) else model
    return [_run(module, case) for case in cases]


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
        outputs = module(*case.args, **case.kwargs)
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
