"""How an operator of this package is put together: one record, one way to register it.

Every operator is a `torch.library` operator in the namespace `fxfuse`. Its composite implementation serves every
device; its Triton kernels, where it has some, take the composite's place on CUDA (`fxfuse.kernels.dispatch`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch

from fxfuse.errors import FxfuseError
from fxfuse.kernels.dispatch import Choice, serve
from fxfuse.kernels.switch import kernels_wanted
from fxfuse.ops.opsets import check_opset
from fxfuse.ops.outside import outside
from fxfuse.torch_seams import OpOverload


class Takes(TypedDict, total=False):
    """Which floating-point types an ONNX operator takes, and what ONNX Runtime wants beyond the definition.

    Types are called float16, bfloat16, float32, float64. tests/onnx/test_takes.py asks onnx and ONNX Runtime again.
    """

    types: list[str]
    """Of the floating-point inputs, by onnx.defs at opset 24."""
    exact: list[str]
    """The types in which nothing is lost, where those are fewer."""
    alike: list[str]
    """Inputs that ONNX Runtime wants of one type, though the definition does not."""
    full: str
    """An input whose last two dims ONNX Runtime does not broadcast."""
    needs: dict[str, list[str]]
    """Outputs that ONNX Runtime has to be asked for where these inputs are given."""
    onnxruntime_cpu: list[str]
    """The types that its CPU provider (1.32) has a kernel for, or a function body of kernels."""


@dataclass(frozen=True)
class OnnxOp:
    """An operator of the namespace `fxfuse` and what it is in ONNX and in ATen."""

    overload: OpOverload
    """The operator, as it stands in a graph: `torch.ops.fxfuse.<name>.default`."""
    onnx_name: str
    """The ONNX operator (default domain) that it becomes."""
    since_opset: int
    """The first opset that has that ONNX operator."""
    make_translation: Callable[[int], Callable[..., Any]]
    """Takes the opset, gives the function for `torch.onnx.export`'s `custom_translation_table`."""
    composite: Callable[..., Any]
    """What it runs where there is no kernel; takes what the operator takes."""
    decomposition: Callable[..., Any]
    """The same computation in ATen operators only; takes what the operator takes."""
    found_by: tuple[str, ...]
    """The `Pattern.operator` of the patterns that it comes of."""
    takes: Takes = field(default_factory=lambda: Takes())
    """What the ONNX operator takes, where that is not every floating-point type."""

    def translation(self, opset: int) -> Callable[..., Any]:
        """The function that writes this operator as one ONNX node of `opset`.

        Raises:
            FxfuseError: `opset` lies outside 23..25. An operator that is younger than `opset` raises only when a
                program really holds it, with the operator's name.
        """
        check_opset(opset)
        if opset >= self.since_opset:
            return self.make_translation(opset)

        def too_old(*args: Any, **kwargs: Any) -> Any:
            raise FxfuseError(
                f"{self.onnx_name} needs opset {self.since_opset}, the export asks for {opset}",
                where=str(self.overload),
                hint=f"export with opset_version={self.since_opset}",
            )

        return too_old


OPS: dict[OpOverload, OnnxOp] = {}
"""Every operator of this package, by the overload that stands in a graph."""
PARTS: dict[OpOverload, OnnxOp] = {}
"""Operators several of which make one ONNX operator."""
JOINS: list[Callable[[Any], object]] = []
"""What makes one node of the nodes of `PARTS`, in place: each takes an `onnx_ir.Model`."""
ANALYTIC: set[str] = set()
"""Operators, as ``"fxfuse::rms_norm"``, that compute an analytic function of what flows through them."""
ACCUMULATING: set[str] = set()
"""The names of the operators that add up within one call, as a matrix product does."""


def define_op(
    name: str,
    schema: str,
    *,
    composite: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    decomposition: Callable[..., Any],
    onnx_name: str,
    since_opset: int,
    make_translation: Callable[[int], Callable[..., Any]],
    takes: Takes | None = None,
    kernels: str | None = None,
    choose: Choice | None = None,
    found_by: tuple[str, ...] | None = None,
    analytic: bool = False,
    accumulates: bool = False,
    part: bool = False,
) -> OnnxOp:
    """Register `fxfuse::name` with all its parts and enter it in `OPS`, or in `PARTS`.

    Args:
        name: of the operator, without the namespace.
        schema: its arguments and outputs, as torch.library takes them.
        composite: what it runs where there is no kernel.
        fake: its outputs' shapes, types and strides; raises FxfuseError on what does not fit.
        setup_context: keeps for `backward` what it needs, as torch.library.register_autograd has it.
        backward: the gradients of the inputs.
        decomposition: the same computation in ATen operators only.
        onnx_name: the ONNX operator (default domain) that it becomes.
        since_opset: the first opset that has that ONNX operator.
        make_translation: takes the opset, gives the function for torch.onnx.export's `custom_translation_table`.
        takes: what the ONNX operator takes, where that is not every floating-point type.
        kernels: the module whose `KERNELS` has its Triton kernel; imported when a kernel runs for the first time.
        choose: gives what to call for these arguments in place of the kernel; None means always the kernel.
        found_by: the `Pattern.operator` of the patterns that it comes of; None means the one of `onnx_name`.
        analytic: does it compute an analytic function of what flows through it? Rounding to integers does not.
        accumulates: does it add up within one call?
        part: do several of these make one ONNX operator?
    """
    _define(name, schema, composite, fake)
    torch.library.register_autograd(f"fxfuse::{name}", backward, setup_context=setup_context)
    overload: OpOverload = getattr(torch.ops.fxfuse, name).default
    op = OnnxOp(
        overload,
        onnx_name,
        since_opset,
        make_translation,
        composite,
        decomposition,
        found_by or (onnx_name,),
        takes or Takes(),
    )
    (PARTS if part else OPS)[overload] = op
    if analytic:
        ANALYTIC.add(f"fxfuse::{name}")
    if accumulates:
        ACCUMULATING.add(name)
    if kernels is not None:
        serve(name, kernels, composite, choose)
    return op


def define_backward(
    name: str, schema: str, *, composite: Callable[..., Any], fake: Callable[..., Any], kernels: str
) -> None:
    """Register `fxfuse::name`, a backward pass that has a kernel; `composite` is what it runs where there is none.

    An operator's backward function calls it where `has_kernel` says so. It has no gradient of its own.
    """
    _define(name, schema, composite, fake)
    serve(name, kernels, composite, backward=True)


def _define(name: str, schema: str, composite: Callable[..., Any], fake: Callable[..., Any]) -> None:
    torch.library.define(f"fxfuse::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"fxfuse::{name}", "default", composite)
    torch.library.register_fake(f"fxfuse::{name}", fake)


def has_kernel(grad: torch.Tensor) -> bool:
    """Can the backward pass of this gradient be a kernel? Not if it is to be differentiated itself."""
    return kernels_wanted(grad.device) and not torch.is_grad_enabled()


def translation_table(opset: int = 24) -> dict[OpOverload, Callable[..., Any]]:
    """What `torch.onnx.export(..., custom_translation_table=)` needs to write every operator as one ONNX node.

    Operators of registered patterns (`fxfuse.pattern(onnx=…)`) are among them, written out: only fxfuse's own doors
    and the plugin can keep a function of another domain whole, for torch.onnx inlines it.

    Args:
        opset: the opset version of the export, 23 to 25.

    Raises:
        FxfuseError: `opset` lies outside 23..25.
    """
    check_opset(opset)
    ours = {overload: op.translation(opset) for overload, op in (OPS | PARTS).items()}
    return ours | {overload: op.written_out for overload, op in outside().items() if op.written_out is not None}


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """Every operator's computation in ATen, as `ExportedProgram.run_decompositions` and `make_fx` take it; those of
    registered patterns are among them."""
    ours = {overload: op.decomposition for overload, op in (OPS | PARTS).items()}
    return ours | {overload: op.decomposition for overload, op in outside().items()}


def holds_fused(program: torch.export.ExportedProgram) -> bool:
    """Does the program hold operators of this package?"""
    return any(node.target in OPS or node.target in PARTS for node in program.graph.nodes if node.op == "call_function")
