"""Stored integers in an ONNX file, written in as few bits as they need: four where four are enough.

PyTorch keeps an integer of four bits in a byte (`fxfuse.ops.dequantize_linear`). Here the integers of every
DequantizeLinear are written as INT4 or UINT4, two in a byte, if all values fit. So are its zero points, because ONNX
wants them in the same type; zero points that are all 0 are left out. No value changes.

Memory: nothing is widened on the way. Beside the integers that the program holds, there is one packed copy of one
tensor, half as large. Integers that the model keeps several to a word were unpacked before
(`fxfuse.onnx.translate.unpacked`).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from fxfuse.ops.dequantize_linear import NARROW, stored_as

_X, _ZERO = 0, 2
_KINDS = {ir.DataType.INT8: torch.int8, ir.DataType.UINT8: torch.uint8}


def pack_integers(model: ir.Model) -> int:
    """Write, in place, the integers that the model's DequantizeLinears read in as few bits as they need.

    Returns:
        How many tensors of integers became smaller.
    """
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph.all_nodes():
        x = node.inputs[_X] if node.op_type == "DequantizeLinear" and node.domain == "" else None
        if x is not None:
            without_views(node)
            without_zeros(node)
            readers.setdefault(node.inputs[_X], []).append(node)  # type: ignore[arg-type]
    count = 0
    for x, nodes in readers.items():
        count += _packed(model.graph, x, nodes)
    return count


def without_views(node: ir.Node) -> None:
    """Let the node read an initializer that it reads through a Reshape, as it does before the model is optimised.

    Views that change the shape stay.
    """
    for place, value in enumerate(node.inputs):
        producer = None if value is None else value.producer()
        if value is None or producer is None or producer.op_type != "Reshape" or producer.graph is None:
            continue
        source = producer.inputs[0]
        if source is not None and _held(source) is not None and source.shape == value.shape:
            node.replace_input_with(place, source)
            if not value.uses() and not value.is_graph_output():
                producer.graph.remove(producer, safe=True)


def without_zeros(node: ir.Node) -> None:
    """Leave out zero points that are all 0, which is what ONNX takes if there are none."""
    zero = _zero(node)
    values = None if zero is None else _held(zero)
    if zero is None or values is None or values.any():
        return
    node.resize_inputs(_ZERO)
    _forget(zero)


def _packed(graph: ir.Graph, x: ir.Value, nodes: list[ir.Node]) -> bool:
    """Writes x, and the zero points of all who read it, in a type of four bits."""
    kind = _KINDS.get(x.dtype) if x.dtype is not None else None
    values = _held(x)
    only_here = all(place == _X and user in nodes for user, place in x.uses()) and not x.is_graph_output()
    if kind is None or values is None or values.size == 0 or not only_here:
        return False
    zeros = [zero for node in nodes if (zero := _zero(node)) is not None]
    held = [values, *(v for z in zeros if (v := _held(z)) is not None)]
    if len(held) <= len(zeros):
        return False
    name = stored_as(kind, min(int(v.min()) for v in held), max(int(v.max()) for v in held))
    if name not in NARROW:
        return False
    target = ir.DataType[name]
    x.const_value = _pack(x, values, target)
    x.type = ir.TensorType(target)
    for node in nodes:
        zero = _zero(node)
        if zero is not None:
            node.replace_input_with(_ZERO, _as(graph, zero, target))
            _forget(zero)
    return True


def _as(graph: ir.Graph, zero: ir.Value, kind: ir.DataType) -> ir.Value:
    """A copy of the zero points in this type, for other nodes may read the same ones in another."""
    name = f"{zero.name}.{kind.name.lower()}"
    if name not in graph.initializers:
        values = _held(zero)
        assert values is not None
        graph.register_initializer(ir.val(name, kind, values.shape, const_value=_pack(zero, values, kind, name)))
    return graph.initializers[name]


def _pack(value: ir.Value, values: np.ndarray, kind: ir.DataType, name: str | None = None) -> ir.TensorProtocol:
    return pack_four_bits(values, kind, name or value.name)


def pack_four_bits(values: np.ndarray, kind: ir.DataType, name: str | None) -> ir.TensorProtocol:
    """Integers that take a byte each as `kind`, INT4 or UINT4: two to a byte, the first in the lower half."""
    flat = values.reshape(-1).view(np.uint8)
    packed = flat[0::2] & np.uint8(0x0F)
    packed[: flat.size // 2] |= flat[1::2] << np.uint8(4)
    return ir.PackedTensor(packed, kind, shape=ir.Shape(values.shape), name=name)


def _zero(node: ir.Node) -> ir.Value | None:
    return node.inputs[_ZERO] if len(node.inputs) > _ZERO else None


def _held(value: ir.Value) -> np.ndarray | None:
    """The content of an initializer or a Constant; None if it is neither."""
    producer = value.producer()
    constant = value.is_initializer() or (producer is not None and producer.op_type == "Constant")
    tensor = value.const_value if constant else None
    return None if tensor is None else tensor.numpy()


def _forget(*values: ir.Value) -> None:
    """Remove initializers that nobody reads any more."""
    for value in values:
        graph, name = value.graph, value.name
        if graph is not None and name in graph.initializers and not value.uses() and not value.is_graph_output():
            del graph.initializers[str(name)]
