"""One call of an operator as one ONNX node, run in ONNX Runtime on the CPU."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import torch
from torch import Tensor

from fxfuse.ops.registry import OnnxOp
from fxfuse.parity.matrix import Call
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
    if call.op == "rms_norm":
        X, scale = call.args
        assert X is not None and scale is not None
        if X.dtype != scale.dtype:
            return "it wants X and scale of one type, the specification does not"
    if call.op.startswith("attention"):
        return _attention_refusal(call.op, call.kwargs.get("is_causal", 0), *call.args)
    return None


def _attention_refusal(
    name: str,
    is_causal: int,
    Q: Tensor | None,
    K: Tensor | None,
    V: Tensor | None,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
) -> str | None:
    assert Q is not None and K is not None
    P = 0 if past_key is None else past_key.shape[2]
    T, Sq = P + K.shape[-2 if K.dim() == 4 else 1], Q.shape[-2 if Q.dim() == 4 else 1]
    if past_key is not None and name == "attention":
        return "it does not take past_key without giving present_key"
    if past_key is not None and is_causal and Sq == 1 and T > P + 1:
        return "it leaves is_causal out where there is one query, also where there are more new keys than one"
    if mask is not None and mask.shape[-1] != T:
        return "it wants a mask as long as the keys, the specification does not"
    if mask is not None and mask.is_floating_point():
        lowest = torch.finfo(mask.dtype).min
        if bool((mask <= lowest).all(-1).any()):
            return "it gives 0 to a query whose mask is the lowest number everywhere, the formula gives the mean of V"
    return None


def model(op: OnnxOp, call: Call) -> onnx.ModelProto:
    """A model of the one node; inputs that are None are left out in the middle, too."""
    names = [f"i{n}" if arg is not None else "" for n, arg in enumerate(call.args)]
    count = len(schema_of(op.overload).returns)
    outputs = [f"o{n}" for n in range(count)]
    attributes = dict(call.kwargs)
    if call.op.startswith("attention") and call.args[0].dim() == 4:  # type: ignore[union-attr]
        attributes = {name: value for name, value in attributes.items() if not name.endswith("num_heads")}
    node = onnx.helper.make_node(op.onnx_name, names, outputs, **attributes)
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
