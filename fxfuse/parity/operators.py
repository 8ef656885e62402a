"""One call of an operator in every implementation there is, each against the same formula in float64.

eager         unfused: the decomposition, in ATen operators
composite     what the operator runs where there is no kernel
triton        its kernel: compiled on a GPU, interpreted on the CPU
onnxruntime   one ONNX node, on the CPU
... backward  the gradients of the first three
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fxfuse.ops
from fxfuse import kernels
from fxfuse.errors import FxfuseError
from fxfuse.kernels.switch import use_kernels
from fxfuse.ops.calls import Call
from fxfuse.ops.registry import OnnxOp
from fxfuse.parity.cell import Cell, judged, skipped
from fxfuse.parity.compare import rms
from fxfuse.parity.matrix import matrix_of
from fxfuse.parity.node import Refused, run_node

Tensors = tuple[Tensor, ...]


def cells(call: Call, *, backward: bool = True, onnxruntime: bool = True) -> Iterator[Cell]:
    """Every implementation's cell for one call. ONNX Runtime's runs on the CPU wherever the call's tensors are."""
    op = _operator(call.op)
    differentiable = backward and matrix_of(call.op).differentiable
    exact = run(op.decomposition, widened(call), differentiable)
    eager = run(op.decomposition, call, differentiable)
    yield from _cells(call, "eager", eager, eager, exact)
    with use_kernels("never"):
        yield from _cells(call, "composite", run(op.overload, call, differentiable), eager, exact)
    why = _no_kernel(call)
    if why is None:
        with use_kernels("always") as declined:
            found = run(op.overload, call, differentiable)
        why = declined[0][1] if declined else None
    if why is None:
        yield from _cells(call, "triton", found, eager, exact)
    else:
        yield skipped(call.op, call.point, "triton", why)
    if onnxruntime:
        yield _onnxruntime(call, op, eager, exact)


@dataclass(frozen=True)
class Ran:
    """What one implementation gave."""

    outputs: Tensors
    gradients: Tensors
    """Of the floating-point inputs, for a drawn gradient of the outputs; empty if not asked for."""


def run(function: Callable[..., Any], call: Call, differentiable: bool) -> Ran:
    """The outputs of a call, and their gradients."""
    args = [a if a is None or not a.is_floating_point() else a.detach().requires_grad_(True) for a in call.args]
    leaves = [a for a in args if a is not None and a.requires_grad]
    with torch.set_grad_enabled(differentiable):
        outputs = function(*args, **call.kwargs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    detached = tuple(output.detach() for output in outputs)
    if not differentiable:
        return Ran(detached, ())
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs)
    # The same numbers for every implementation: what the working type holds.
    grads = [g.to(call.dtype).to(o.device, o.dtype) for g, o in zip(drawn, outputs, strict=True)]
    return Ran(detached, torch.autograd.grad(outputs, leaves, grads))


def widened(call: Call) -> Call:
    """The call in float64, without the roundings that its arguments ask for."""
    args = tuple(a.double() if a is not None and a.is_floating_point() else a for a in call.args)
    return Call(call.op, call.point, args, {**call.kwargs, **matrix_of(call.op).exactly}, torch.float64)


def _no_kernel(call: Call) -> str | None:
    """Why Triton does not run this call."""
    device = next(arg.device for arg in call.args if arg is not None)
    return kernels.missing(device) or kernels.unsupported(call.op, *call.args, **call.kwargs)


def _onnxruntime(call: Call, op: OnnxOp, eager: Ran, exact: Ran) -> Cell:
    try:
        outputs = run_node(op, call)
    except Refused as why:
        return skipped(call.op, call.point, "onnxruntime", f"ONNX Runtime: {why}")
    except FxfuseError as error:
        return Cell(call.op, call.point, "onnxruntime", float("inf"), False, " ".join(error.what.split()))
    return judged(call.op, call.point, "onnxruntime", outputs, eager.outputs, exact.outputs, call.dtype)


def _cells(call: Call, name: str, found: Ran, eager: Ran, exact: Ran) -> Iterator[Cell]:
    yield judged(call.op, call.point, name, found.outputs, eager.outputs, exact.outputs, call.dtype)
    if found.gradients:
        # One key, and the gradient of Q is zero: what rounds are its terms, as large as the other gradients.
        every = torch.cat([gradient.flatten() for gradient in exact.gradients])
        floor = rms(every[every.abs() > 1e-9 * every.abs().max()]) if every.any() else 0.0
        both = (eager.gradients, exact.gradients)
        yield judged(f"{call.op} backward", call.point, name, found.gradients, *both, call.dtype, floor)


def _operator(name: str) -> OnnxOp:
    return fxfuse.ops.OPS[getattr(torch.ops.fxfuse, name).default]
