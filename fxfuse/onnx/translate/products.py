"""Quantised weights as runtimes read them fastest: a product's as columns, an embedding's by rows.

PyTorch keeps a linear layer's weight as [N, K] and turns it, so that a translation is DequantizeLinear, Transpose,
MatMul. ONNX Runtime (1.32) makes one kernel, MatMulNBits, of a DequantizeLinear that a MatMul reads directly, and of
this one a float matrix in every call. It looks rows up in an embedding after it has dequantised the whole table, in
every call too. Both are written the other way round, which changes no number:

    Transpose(DequantizeLinear(x))    DequantizeLinear(x turned), turned here where nothing else reads x
    Gather(DequantizeLinear(x), ids)  DequantizeLinear(Gather(x, ids)), for a table with blocks along its rows

Where both read one x (an output that is tied to the embedding) it stays the only copy in the file: runtimes fold the
Transpose, and the Cast that ONNX's Gather needs for 4 bits, when they load.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fxfuse.onnx.translate.packed import pack_four_bits

_FOUR_BITS = {ir.DataType.INT4: ir.DataType.INT8, ir.DataType.UINT4: ir.DataType.UINT8}


def arrange_quantised_weights(model: ir.Model) -> int:
    """Turns and gathers integers in place of the floating-point numbers that DequantizeLinear makes of them.

    Only DequantizeLinears of initializers with two dimensions are looked at, and only where all that read one are
    Transposes, or Gathers of rows.

    Returns:
        How many DequantizeLinears were replaced.
    """
    count = 0
    for node in list(model.graph.all_nodes()):
        if node.op_type == "DequantizeLinear" and node.domain == "" and _kept(node):
            count += _arranged(node)
    return count


def _kept(node: ir.Node) -> bool:
    """Are its integers a matrix, and they, scales and zero points stored in the model?"""
    given = [value for value in node.inputs if value is not None]
    held = all(v.is_initializer() and v.const_value is not None and v.shape is not None for v in given)
    x = node.inputs[0]
    return held and x is not None and x.shape is not None and len(x.shape) == 2 and node.graph is not None


def _arranged(node: ir.Node) -> bool:
    output = node.outputs[0]
    readers = [user for user, _ in output.uses()]
    turns = [n for n in readers if n.op_type == "Transpose" and list(n.attributes.get_ints("perm", [1, 0])) == [1, 0]]
    gathers = [
        n for n, place in output.uses() if n.op_type == "Gather" and place == 0 and n.attributes.get_int("axis", 0) == 0
    ]
    by_rows = _axis(node) == 1 and node.attributes.get_int("block_size", 0) > 0
    others = len(readers) - len(turns) - len(gathers)
    if others or not readers or output.is_graph_output() or (gathers and not by_rows):
        return False
    if turns:
        _turn(node, turns, copied=not gathers)
    for gather in gathers:
        _gather(node, gather)
    graph, given = node.graph, list(node.inputs)
    assert graph is not None
    graph.remove(node, safe=True)
    for value in given:
        if value is not None and not value.uses() and value.name in graph.initializers:
            del graph.initializers[str(value.name)]
    return True


def _axis(node: ir.Node) -> int:
    return node.attributes.get_int("axis", 1) % 2


def _turn(node: ir.Node, turns: list[ir.Node], *, copied: bool) -> None:
    """One DequantizeLinear of what is turned, in the place of all these Transposes."""
    new = [None if value is None else _turned(node, value, copied=copied) for value in node.inputs]
    block = node.attributes.get_int("block_size", 0)
    made = _dequantized(node, new, 1 - _axis(node), block)
    for turn in turns:
        old = turn.outputs[0]
        made.shape = old.shape if made.shape is None else made.shape
        _replace(old, made)
        if turn.graph is not None:
            turn.graph.remove(turn, safe=True)


def _turned(node: ir.Node, value: ir.Value, *, copied: bool) -> ir.Value:
    """The value's transpose: another initializer, or a Transpose of it where the value itself stays."""
    if value.shape is None or len(value.shape) < 2:
        return value
    graph, tensor = node.graph, value.const_value
    assert graph is not None and tensor is not None and value.dtype is not None
    if not copied or len({user for user, _ in value.uses()}) > 1:
        return _inserted(node, "Transpose", [value], value.dtype, list(reversed(value.shape)), perm=[1, 0])
    name = f"{value.name}.transposed"
    turned = tensor.numpy().T
    if value.dtype in _FOUR_BITS:
        held: ir.TensorProtocol = pack_four_bits(np.ascontiguousarray(turned), value.dtype, name)
    else:
        held = ir.tensor(np.ascontiguousarray(turned), name=name)
    made = ir.val(name, value.dtype, turned.shape, const_value=held)
    graph.register_initializer(made)
    return made


def _gather(node: ir.Node, gather: ir.Node) -> None:
    """Dequantises the rows that `gather` picks, and no others."""
    ids, old = gather.inputs[1], gather.outputs[0]
    assert ids is not None
    rows: list[ir.Value | None] = []
    for value in node.inputs:
        if value is None:
            rows.append(None)
            continue
        assert value.dtype is not None and value.shape is not None
        source, kind = value, _FOUR_BITS.get(value.dtype, value.dtype)
        if kind != value.dtype:
            source = _inserted(gather, "Cast", [value], kind, list(value.shape), to=kind.value)
        shape = None if ids.shape is None else [*ids.shape, value.shape[-1]]
        rows.append(_inserted(gather, "Gather", [source, ids], kind, shape, axis=0))
    made = _dequantized(gather, rows, -1, node.attributes.get_int("block_size", 0), like=node)
    made.shape = old.shape
    _replace(old, made)
    assert gather.graph is not None
    gather.graph.remove(gather, safe=True)


def _dequantized(
    at: ir.Node, inputs: list[ir.Value | None], axis: int, block: int, *, like: ir.Node | None = None
) -> ir.Value:
    of = like or at
    attributes = {name: attribute for name, attribute in of.attributes.items() if name not in ("axis", "block_size")}
    made = _inserted(at, "DequantizeLinear", inputs, of.outputs[0].dtype, None, axis=axis, block_size=block)
    producer = made.producer()
    assert producer is not None
    for attribute in attributes.values():
        producer.attributes.add(attribute)
    return made


def _inserted(
    before: ir.Node,
    kind: str,
    inputs: list[ir.Value | None] | list[ir.Value],
    dtype: ir.DataType | None,
    shape: list[int | ir.SymbolicDim] | None,
    **attributes: int | list[int],
) -> ir.Value:
    """What a new node gives that stands before this one."""
    graph = before.graph
    assert graph is not None
    node = ir.node(kind, inputs, attributes)
    node.metadata_props.update(before.metadata_props)
    graph.insert_before(before, node)
    output = node.outputs[0]
    output.type = None if dtype is None else ir.TensorType(dtype)
    output.shape = None if shape is None else ir.Shape(shape)
    return output


def _replace(old: ir.Value, new: ir.Value) -> None:
    """Everyone who reads `old` reads `new`, which takes its name, and its place among the outputs."""
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    if not new.name:
        new.name = old.name
