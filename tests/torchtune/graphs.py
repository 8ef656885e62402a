"""What the matrix asks of a fused FX graph and of an ONNX graph."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx import numpy_helper
from torch.fx import Node

import fxfuse.ops  # noqa: F401  (defines torch.ops.fxfuse)

OPERATORS = {
    "RMSNormalization": torch.ops.fxfuse.rms_norm.default,
    "RotaryEmbedding": torch.ops.fxfuse.rotary_embedding.default,
    "Attention": torch.ops.fxfuse.attention.default,
}

# ---- FX

FX_LAYOUT = {
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "transpose", "permute", "t", "squeeze", "unsqueeze",
    "clone", "contiguous", "alias", "to", "_to_copy", "type_as", "rms_norm", "rotary_embedding",
}  # fmt: skip
FX_REPEAT = {"expand", "expand_as", "repeat", "repeat_interleave", "tile", "broadcast_to"}


def fx_counts(program: torch.export.ExportedProgram) -> dict[str, int]:
    targets = Counter(node.target for node in program.graph.nodes)
    return {name: targets[op] for name, op in OPERATORS.items()}


def fx_attentions(program: torch.export.ExportedProgram) -> list[Node]:
    return [node for node in program.graph.nodes if node.target is OPERATORS["Attention"]]


def fx_kv_heads(attention: Node) -> int:
    """The number of heads in K, as its shape says or, for [B, S, H·D], the attribute."""
    key = attention.args[1]
    assert isinstance(key, Node)
    shape = key.meta["val"].shape
    return int(shape[1]) if len(shape) == 4 else int(attention.kwargs["kv_num_heads"])  # type: ignore[arg-type]


def fx_repeats(attention: Node) -> list[str]:
    """Nodes that repeat data on the way into K and V, seen through layout, rotary embedding and norm."""
    found = []
    for start in attention.args[1:3]:
        node: Any = start
        while isinstance(node, Node) and node.op == "call_function":
            name = getattr(node.target, "_opname", str(node.target))
            if name in FX_REPEAT:
                found.append(node.format_node() or node.name)
            if name not in FX_LAYOUT | FX_REPEAT:
                break
            node = node.args[0]
    return found


# ---- ONNX

ONNX_LAYOUT = {
    "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast", "RotaryEmbedding",
    "RMSNormalization",
}  # fmt: skip
ONNX_REPEAT = {"Expand", "Tile"}


def onnx_nodes(model: ir.Model) -> list[ir.Node]:
    return [*model.graph.all_nodes(), *(node for f in model.functions.values() for node in f.all_nodes())]


def onnx_counts(model: ir.Model) -> dict[str, int]:
    types = Counter(node.op_type for node in onnx_nodes(model) if node.domain == "")
    return {name: types[name] for name in OPERATORS}


def onnx_attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in onnx_nodes(model) if node.domain == "" and node.op_type == "Attention"]


def onnx_kv_heads(attention: ir.Node) -> int:
    if "kv_num_heads" in attention.attributes:
        return attention.attributes["kv_num_heads"].as_int()
    key = attention.inputs[1]
    assert key is not None and key.shape is not None and len(key.shape) == 4, "the shape of K is unknown"
    return int(key.shape[1])  # type: ignore[arg-type]


def onnx_repeats(attention: ir.Node) -> list[str]:
    found = []
    for value in attention.inputs[1:3]:
        node = value.producer() if value is not None else None
        while node is not None and node.op_type in ONNX_LAYOUT | ONNX_REPEAT:
            if node.op_type in ONNX_REPEAT:
                found.append(str(node))
            source = node.inputs[0]
            node = source.producer() if source is not None else None
    return found


def upcast(model: onnx.ModelProto, source: int = onnx.TensorProto.BFLOAT16) -> onnx.ModelProto:
    """A copy of the model that stores and computes in float32 whatever was in `source`."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for graph in [copy.graph, *copy.functions]:
        _upcast(graph, source)
    return copy


def _upcast(graph: Any, source: int) -> None:
    def tensor(value: onnx.TensorProto) -> None:
        if value.data_type == source:
            array = numpy_helper.to_array(value).astype("float32")
            value.CopyFrom(numpy_helper.from_array(array, value.name))

    infos = [*graph.value_info]
    if isinstance(graph, onnx.GraphProto):
        infos += [*graph.input, *graph.output]
        for initializer in graph.initializer:
            tensor(initializer)
    for info in infos:
        if info.type.tensor_type.elem_type == source:
            info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                tensor(attribute.t)
            elif attribute.type == onnx.AttributeProto.GRAPH:
                _upcast(attribute.g, source)
            elif attribute.name in ("to", "dtype", "softmax_precision") and attribute.i == source:
                attribute.i = onnx.TensorProto.FLOAT
