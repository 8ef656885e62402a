"""``fxfuse.onnx.export(check=True)``: the ONNX program compared with eager PyTorch, in ONNX Runtime."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from fxfuse.errors import FxfuseError, ParityError
from fxfuse.files import save
from fxfuse.fusion import unfuse
from fxfuse.ops import holds_fused
from fxfuse.parity.eager import Check, check_model, expectations
from fxfuse.parity.original import original_outputs
from fxfuse.state.lift import Lifted


def check_export(
    onnx_program: torch.onnx.ONNXProgram,
    model: torch.nn.Module | ExportedProgram,
    lifted: Lifted,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> list[Check]:
    """Run `onnx_program` and `model` at the sample, at batch 1 and at another batch and length where these vary.

    State that is written in place is handed from each of these calls to the next.

    Args:
        onnx_program: the exported program; it is written to a temporary folder.
        model: the model that it was exported from. Its state is restored afterwards.
        lifted: the capture of `model`.
        args: sample inputs, for a program that was saved without any.
        kwargs: the same by name.

    Raises:
        ParityError: they compute something else; the message holds the largest difference.
        FxfuseError: ONNX Runtime is missing or does not run the program, or eager PyTorch does not run the model.
    """
    check_weights(model)
    program = lifted.program
    given = (args, kwargs) if program.example_inputs is None and (args or kwargs) else (None, None)
    cases, eager = original_outputs(model, lifted, *given)
    expected = expectations(unfuse(program) if holds_fused(program) else program, cases, eager)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save(onnx_program, path, external_data=True)
        checks = check_model(path, expected)
    failed = [check for check in checks if not check.result.passed]
    if failed:
        worst = max(failed, key=lambda check: check.result.max_abs)
        raise ParityError(
            "ONNX Runtime does not give what eager PyTorch does: the largest difference is "
            f"{worst.result.max_abs:.3g}; {worst.result.reason}",
            where=f"{worst.case} ({worst.sizes})",
            hint="fxfuse.report(fxfuse.fuse(program)) says what was fused; patterns=[] fuses nothing",
        )
    return checks


def check_weights(model: torch.nn.Module | ExportedProgram) -> None:
    """Refuse weights that hold no values.

    Raises:
        FxfuseError: one is on the meta device.
    """
    tensors = model.state_dict.items() if isinstance(model, ExportedProgram) else model.state_dict().items()
    meta = [name for name, tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.is_meta]
    if meta:
        raise FxfuseError(
            "weights on the meta device hold no values to compare with",
            where=meta[0],
            hint="check=False, or load the weights first",
        )
