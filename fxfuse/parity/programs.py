"""A whole model in every implementation: unfused, fused, with its Triton kernels, and in ONNX Runtime."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

import fxfuse
from fxfuse import kernels
from fxfuse.errors import FxfuseError
from fxfuse.kernels.switch import use_kernels
from fxfuse.parity.cell import Cell, judged, skipped
from fxfuse.parity.ort import check_onnx, open_session
from fxfuse.parity.shapes import ShapeCase, shape_cases
from fxfuse.parity.wide import tensors_of, wide_outputs, working_dtype
from fxfuse.state.lift import lift
from fxfuse.torch_seams import own_weights, pytree

Outputs = list[torch.Tensor]


def program_cells(
    name: str, program: ExportedProgram, *, opset: int = 24, device: torch.device | str = "cpu"
) -> Iterator[Cell]:
    """Every implementation's cell for a program, at its export shape, at batch 1 and at another shape.

    Args:
        name: what to call the program.
        program: captured on the CPU, not fused. What it writes in place is an input and an output here.
        opset: of the ONNX model.
        device: where PyTorch and Triton run; ONNX Runtime and the float64 reference run on the CPU.

    Raises:
        FxfuseError: the program cannot be fused or exported.
    """
    device = torch.device(device)
    program = lift(program).program
    cases = shape_cases(program)
    dtype = working_dtype(program)
    fused = fxfuse.fuse(program, opset=opset, frozen=True)
    exact = [wide_outputs(program, case.args, case.kwargs) for case in cases]
    plain = module_on(program, device)
    eager = [outputs(plain, case, device) for case in cases]
    module = module_on(fused, device)
    why = kernels.missing(device)
    session = _Session(fused, opset, dtype)
    for case, e, w in zip(cases, eager, exact, strict=True):
        point = {"dtype": str(dtype).removeprefix("torch."), "case": case.label, "inputs": case.sizes}
        rest: tuple[Any, ...] = (e, w, dtype)
        yield judged(name, point, "eager", e, *rest)
        with use_kernels("never"):
            yield judged(name, point, "composite", outputs(module, case, device), *rest)
        if why:
            yield skipped(name, point, "triton", why)
        else:
            yield from _triton(name, point, module, case, device, *rest)
        if session.why:
            yield skipped(name, point, "onnxruntime", session.why)
        else:
            yield _noted(judged(name, point, "onnxruntime", session(case), *rest), session.note)


def _triton(
    name: str, point: dict[str, str], module: torch.nn.Module, case: ShapeCase, device: torch.device, *rest: Any
) -> Iterator[Cell]:
    with use_kernels("always") as declined:
        found = outputs(module, case, device)
    operators = sorted({f"{operator}: {why}" for operator, why in declined})
    note = "without " + "; ".join(operators) if operators else None
    yield _noted(judged(name, point, "triton", found, *rest), note)


def _noted(cell: Cell, note: str | None) -> Cell:
    return replace(cell, reason=note) if cell.passed and note else cell


class _Session:
    """The fused program's ONNX model in ONNX Runtime.

    Attributes:
        why: what keeps it from running.
        note: what to know about how it runs.
    """

    def __init__(self, fused: ExportedProgram, opset: int, dtype: torch.dtype) -> None:
        from fxfuse.files import save
        from fxfuse.onnx.exporter import translate

        self.why: str | None = None
        self.note = "as its float32 twin: it has no bfloat16 kernels" if dtype == torch.bfloat16 else None
        try:
            import onnxruntime  # noqa: F401
        except ImportError:
            self.why = "onnxruntime is not installed"
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            save(translate(fused, opset=opset, verbose=False), path, external_data=True)
            check_onnx(path)
            _, self.run = open_session(path, dtype)

    def __call__(self, case: ShapeCase) -> Outputs:
        return self.run(*case.inputs)


def module_on(program: ExportedProgram, device: torch.device) -> torch.nn.Module:
    """The program as a module on that device; the program itself stays where it is."""
    if device.type == "cpu":
        return program.module(check_guards=False)
    from torch.export.passes import move_to_device_pass

    from fxfuse.graph.program import copy_program

    moved = copy_program(program)
    # The pass writes into these dicts and into the bodies of higher-order operators, which the copy shares.
    own_weights(moved)
    for name, body in moved.graph_module.named_children():
        if isinstance(body, torch.fx.GraphModule):
            setattr(moved.graph_module, name, copy.deepcopy(body))
    return move_to_device_pass(moved, device).module(check_guards=False)


def outputs(module: torch.nn.Module, case: ShapeCase, device: torch.device) -> Outputs:
    """The tensors that the module gives for a case."""
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (case.args, case.kwargs))
    with torch.no_grad():
        found: Any = module(*args, **kwargs)
    return tensors_of(found)


def check_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        FxfuseError: it is no device, or there is none of that kind here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise FxfuseError(f"no device {name!r}", where="--device", hint="cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise FxfuseError(f"parity is not tried on {device.type}", where="--device", hint="cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FxfuseError("there is no GPU here", where=f"--device {name}", hint="--device cpu")
    return device
