"""One call of an operator as one ONNX node, run in ONNX Runtime on the CPU."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import torch
from torch import Tensor

from fxfuse.ops.calls import Call
from fxfuse.ops.registry import OnnxOp
from fxfuse.parity.matrix import matrix_of
from fxfuse.parity.ort import OnnxRuntime
from fxfuse.torch_seams import schema_of

OPSET = 24
TYPES = {
    torch.float64: onnx.TensorProto.DOUBLE,
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.int64: onnx.TensorProto.INT64,
    torch.bool: onnx.TensorProto.BOOL,
}


class Refused(Exception):
    """ONNX Runtime has no kernel for this node, or one that is known to compute something else: nothing to compare."""


def run_node(op: OnnxOp, call: Call) -> tuple[Tensor, ...]:
    """The outputs of the node that the operator is exported as.

    Raises:
        Refused: ONNX Runtime's CPU provider has no (right) kernel for it.
        FxfuseError: onnxruntime is not installed, or fails for another reason.
    """
    args = [arg for arg in call.args if arg is not None]
    why = refusal(call)
    if why is not None:
        raise Refused(why)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "node.onnx"
        onnx.save(model(op, call), path)
        return tuple(OnnxRuntime(path, quiet=True)(*(arg.contiguous() for arg in args)))


def refusal(call: Call) -> str | None:
    """What the CPU provider of ONNX Runtime 1.32 is known not to do, as seen in runs of this matrix."""
    if any(arg is not None and arg.dtype == torch.bfloat16 for arg in call.args):
        return "it has no bfloat16 kernels"
    return matrix_of(call.op).refused(call)


def model(op: OnnxOp, call: Call) -> onnx.ModelProto:
    """A model of the one node; inputs that are None are left out in the middle, too."""
    names = [f"i{n}" if arg is not None else "" for n, arg in enumerate(call.args)]
    count = len(schema_of(op.overload).returns)
    outputs = [f"o{n}" for n in range(count)]
    node = onnx.helper.make_node(op.onnx_name, names, outputs, **matrix_of(call.op).attributes(call))
    inputs = [
        onnx.helper.make_tensor_value_info(name, TYPES[arg.dtype], list(arg.shape))
        for name, arg in zip(names, call.args, strict=True)
        if arg is not None
    ]
    blank = [onnx.ValueInfoProto(name=name) for name in outputs]
    graph = onnx.helper.make_graph([node], "call", inputs, blank)
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    # ONNX Runtime 1.32 reads IR versions up to 11; onnx writes a newer one by default.
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11)
