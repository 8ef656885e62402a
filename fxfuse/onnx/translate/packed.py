"""Stored integers in an ONNX file: as small as they are, four bits where four are enough.

PyTorch carries integers of four bits a byte each (`fxfuse.ops.dequantize_linear`). Here every DequantizeLinear whose
integers are kept in the model gets them as INT4 or UINT4, two in a byte, if all the values fit, and its zero points,
which have to be of the same type; zero points that are all 0 are left out. The value of no element changes. Nothing is
made wider on the way: beside the integers that the program holds there is one tensor's packed copy at half the size,
and the values are looked at in their own type. Integers that the model takes out of words (two of four bits from a
byte, eight from an int32) are taken out here, one tensor after the other, in the types in which the graph does it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from fxfuse.ops.dequantize_linear import NARROW, stored_as

_X, _ZERO = 0, 2
_KINDS = {ir.DataType.INT8: torch.int8, ir.DataType.UINT8: torch.uint8}


def pack_integers(model: ir.Model) -> int:
    """Writes what the model's DequantizeLinears read in as few bits as it takes, in place.

    Returns:
        How many tensors of integers became smaller.
    """
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph.all_nodes():
        x = node.inputs[_X] if node.op_type == "DequantizeLinear" and node.domain == "" else None
        if x is not None:
            for place in (_X, _ZERO)[: 1 + (_zero(node) is not None)]:
                folded(model, node, place)
                _of_its_type(node.inputs[place])
            without_zeros(node)
            readers.setdefault(node.inputs[_X], []).append(node)  # type: ignore[arg-type]
    count = 0
    for x, nodes in readers.items():
        count += _packed(model.graph, x, nodes)
    return count


def _of_its_type(value: ir.Value | None) -> None:
    """torch's optimizer leaves a shift of uint8 that it computed in int16, and the value says uint8 still."""
    values = None if value is None else _held(value)
    if value is None or values is None or value.dtype is None or value.const_value is None:
        return
    if value.const_value.dtype != value.dtype:
        value.const_value = ir.tensor(values.astype(value.dtype.numpy()), name=value.name)


def folded(model: ir.Model, node: ir.Node, place: int) -> None:
    """What the node reads there as an initializer, if it is made of initializers by operators on integers."""
    value = node.inputs[place]
    nodes = None if value is None or value.producer() is None else _made_by(value)
    if value is None or not nodes:
        return
    result = _run(model, nodes, value)
    name = f"{value.name}.integers"
    if name not in model.graph.initializers:
        model.graph.register_initializer(
            ir.val(name, value.dtype, result.shape, const_value=ir.tensor(result, name=name))
        )
    node.replace_input_with(place, model.graph.initializers[name])
    _forget_nodes(nodes)


def _made_by(value: ir.Value) -> list[ir.Node] | None:
    """The nodes that make it, in order; None where something else than integers that are kept has a part in it."""
    found: dict[ir.Node, None] = {}
    done: set[ir.Value] = set()

    def known(wanted: ir.Value) -> bool:
        if wanted in done or _held(wanted) is not None:
            return True
        producer = wanted.producer()
        whole = wanted.dtype is not None and (wanted.dtype.is_integer() or wanted.dtype == ir.DataType.BOOL)
        if producer is None or not whole or not all(i is None or known(i) for i in producer.inputs):
            return False
        done.update(producer.outputs)
        found[producer] = None
        return True

    return list(found) if known(value) else None


def _run(model: ir.Model, nodes: list[ir.Node], value: ir.Value) -> np.ndarray:
    """What these nodes give, in ONNX's own reference."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    read = {i for n in nodes for i in n.inputs if i is not None and (i.producer() is None or i.producer() not in nodes)}
    kept = [onnx.numpy_helper.from_array(_array(i), i.name) for i in read]
    graph = onnx.helper.make_graph(
        [ir.to_proto(n) for n in nodes], "integers", [], [onnx.ValueInfoProto(name=value.name)], kept
    )
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    made = onnx.helper.make_model(graph, opset_imports=opsets)
    (result,) = ReferenceEvaluator(made).run(None, {})
    assert value.dtype is not None, "what DequantizeLinear reads has a type"
    return np.asarray(result).astype(value.dtype.numpy(), copy=False)


def _array(value: ir.Value) -> np.ndarray:
    held = _held(value)
    assert held is not None, "only what is kept is read"
    return held


def without_zeros(node: ir.Node) -> None:
    """Leaves out zero points that are all 0, as they are where there are none."""
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
    """The zero points in this type; others may read the same ones in another."""
    name = f"{zero.name}.{kind.name.lower()}"
    if name not in graph.initializers:
        values = _held(zero)
        assert values is not None
        graph.register_initializer(ir.val(name, kind, values.shape, const_value=_pack(zero, values, kind, name)))
    return graph.initializers[name]


def _pack(value: ir.Value, values: np.ndarray, kind: ir.DataType, name: str | None = None) -> ir.TensorProtocol:
    """Two to a byte, the first in the lower half."""
    flat = values.reshape(-1).view(np.uint8)
    packed = flat[0::2] & np.uint8(0x0F)
    packed[: flat.size // 2] |= flat[1::2] << np.uint8(4)
    return ir.PackedTensor(packed, kind, shape=ir.Shape(values.shape), name=name or value.name)


def _zero(node: ir.Node) -> ir.Value | None:
    return node.inputs[_ZERO] if len(node.inputs) > _ZERO else None


def _held(value: ir.Value) -> np.ndarray | None:
    """What an initializer, or a Constant, holds."""
    producer = value.producer()
    constant = value.is_initializer() or (producer is not None and producer.op_type == "Constant")
    tensor = value.const_value if constant else None
    return None if tensor is None else tensor.numpy()


def _forget_nodes(nodes: list[ir.Node]) -> None:
    """Takes nodes out that nobody reads any more, and the initializers that they alone read."""
    for node in reversed(nodes):
        if any(output.uses() or output.is_graph_output() for output in node.outputs) or node.graph is None:
            continue
        read = [i for i in node.inputs if i is not None]
        node.graph.remove(node, safe=True)
        _forget(*read)


def _forget(*values: ir.Value) -> None:
    """Takes initializers out that nobody reads any more."""
    for value in values:
        graph, name = value.graph, value.name
        if graph is not None and name in graph.initializers and not value.uses() and not value.is_graph_output():
            del graph.initializers[str(name)]
