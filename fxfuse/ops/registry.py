"""How an operator of this package is put together: one record, one way to register it.

Every operator is a `torch.library` operator in the namespace `fxfuse`. Its composite implementation serves every
device; `fxfuse.kernels.dispatch` adds the kernels that take its place on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from fxfuse.errors import FxfuseError
from fxfuse.ops.switch import kernels_wanted
from fxfuse.torch_seams import OpOverload

FIRST_OPSET = 23
"""The first ONNX opset with RMSNormalization, RotaryEmbedding and Attention."""

LAST_OPSET = 25
"""The last ONNX opset that these translations were checked against."""


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
    part: bool = False,
) -> OnnxOp:
    """Register `fxfuse::name` with all its parts and enter it in `OPS`, or in `PARTS`."""
    qualified = f"fxfuse::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "default", composite)
    torch.library.register_fake(qualified, fake)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    overload: OpOverload = getattr(torch.ops.fxfuse, name).default
    op = OnnxOp(overload, onnx_name, since_opset, make_translation, composite, decomposition)
    (PARTS if part else OPS)[overload] = op
    return op


def define_backward(name: str, schema: str, *, composite: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register `fxfuse::name`, a backward pass that has a kernel; `composite` is what it runs where there is none.

    An operator's backward function calls it where `has_kernel` says so. It has no gradient of its own.
    """
    qualified = f"fxfuse::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "default", composite)
    torch.library.register_fake(qualified, fake)


def has_kernel(grad: torch.Tensor) -> bool:
    """Can the backward pass of this gradient be a kernel? Not if it is to be differentiated itself."""
    return kernels_wanted(grad.device) and not torch.is_grad_enabled()


def translation_table(opset: int = 24) -> dict[OpOverload, Callable[..., Any]]:
    """What `torch.onnx.export(..., custom_translation_table=)` needs to write every operator as one ONNX node.

    Args:
        opset: the opset version of the export, 23 to 25.

    Raises:
        FxfuseError: `opset` lies outside 23..25.
    """
    check_opset(opset)
    return {overload: op.translation(opset) for overload, op in (OPS | PARTS).items()}


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """Every operator's computation in ATen, as `ExportedProgram.run_decompositions` and `make_fx` take it."""
    return {overload: op.decomposition for overload, op in (OPS | PARTS).items()}


def holds_fused(program: torch.export.ExportedProgram) -> bool:
    """Does the program hold operators of this package?"""
    return any(node.target in OPS or node.target in PARTS for node in program.graph.nodes if node.op == "call_function")


def check_opset(opset: object) -> None:
    """Raise FxfuseError unless the fused operators exist in this opset."""
    if not isinstance(opset, int) or isinstance(opset, bool) or not FIRST_OPSET <= opset <= LAST_OPSET:
        raise FxfuseError(
            f"the fused operators exist in ONNX opsets {FIRST_OPSET} to {LAST_OPSET}, not in opset {opset!r}",
            where="opset",
            hint="use 24: it has all of them, and ONNX Runtime has kernels for all of them",
        )


def refuse(what: str, where: str, hint: str | None = None) -> NoReturn:
    """Raise FxfuseError; `where` names the argument."""
    raise FxfuseError(what, where=where, hint=hint)


# Sizes can be symbols, which type checkers take for ints. What is not known of a symbol must not be asked of it
# either: the answer would be a guard on the program's input.


def differ(a: int, b: int) -> bool:
    """Are the sizes known to differ?"""
    return a != b if type(a) is type(b) is int else _known(a != b)


def equal(a: int, b: int) -> bool:
    """Are the sizes known to be equal?"""
    return a == b if type(a) is type(b) is int else _known(a == b)


def exceeds(a: int, b: int) -> bool:
    """Is `a` known to be larger than `b`?"""
    return a > b if type(a) is type(b) is int else _known(a > b)


def _known(condition: bool) -> bool:
    from fxfuse.torch_seams import statically_known_true

    return statically_known_true(condition)


def show(tensor: torch.Tensor) -> str:
    """A tensor's shape, for messages."""
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def as_laid_out(tensor: torch.Tensor, order: Sequence[int] | None = None) -> torch.Tensor:
    """`tensor`, its memory in `order` of the dims (default: contiguous), copied only if it must be.

    A fake implementation promises strides; sizes of 1 make that more than `contiguous()`, which leaves the
    strides of such dims as they came.
    """
    order = range(tensor.dim()) if order is None else order
    target = torch.empty_permuted(tensor.shape, tuple(order), dtype=tensor.dtype, device=tensor.device)
    if tensor.stride() == target.stride():
        return tensor
    return target.copy_(tensor)


ONNX_FLOATS = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}
"""ONNX's numbers (TensorProto.DataType) of the floating-point types that `stash_type` and the like can name."""


def onnx_float(number: int, where: str) -> torch.dtype:
    if number not in ONNX_FLOATS:
        refuse(f"{number} is no ONNX floating-point type; known are {list(ONNX_FLOATS)}", where)
    return ONNX_FLOATS[number]


def one_node(operator: Callable[..., Any], inputs: Sequence[Any], attributes: dict[str, Any], defaults: Any) -> Any:
    """What `operator` of an onnxscript opset returns: the outputs of one node.

    Inputs that are None at the end are left out, and so are attributes at their default, which torch's recorder
    would write down.
    """
    while inputs[-1] is None:
        inputs = inputs[:-1]
    given = {name: value for name, value in attributes.items() if value != defaults[name]}
    outputs = operator(*inputs, **given)
    node = (outputs[0] if isinstance(outputs, Sequence) else outputs).producer()
    for name in set(node.attributes) - set(given):
        del node.attributes[name]
    return outputs
