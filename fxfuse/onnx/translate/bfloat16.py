"""bfloat16 in a model that else computes in another type: where ONNX Runtime's CPU provider has no kernel, in float32.

    table (bfloat16) ── Neg ── Expand ── Cast        becomes        table ── Cast ── Neg ── Expand

Many models keep tables and biases in bfloat16 and compute nothing else in it. ONNX Runtime's CPU provider moves and
casts such tensors (`onnxruntime_cpu_bfloat16` in `takes.json`), but has no kernel even to negate them. Operators
without a kernel are computed in float32 here and rounded once, as PyTorch's CPU kernels do. Where nothing is rounded
(Neg), the cast back is left out too.

A model that multiplies matrices or attends in bfloat16 stays as it is: it is meant for a device that can.
"""

from __future__ import annotations

import onnx_ir as ir

from fxfuse.onnx.translate.takes import bfloat16_kernels

EXACT = frozenset(["Abs", "Expand", "Max", "Min", "Neg", "Relu", "Tile", "Trilu", "Where"])
"""Operators whose results are numbers that they read, perhaps with the other sign: nothing is rounded."""
_COMPARES = frozenset(["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"])
_SUMS = frozenset(["Add", "CumSum", "Div", "Mul", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Sub", "Sum"])
_FUNCTIONS = frozenset(["Cos", "Erf", "Exp", "Log", "Pow", "Reciprocal", "Sigmoid", "Sin", "Softmax", "Sqrt", "Tanh"])
_ROUNDS = _SUMS | _FUNCTIONS | frozenset(["Ceil", "Floor", "Round"])


def without_bfloat16_gaps(model: ir.Model) -> int:
    """Compute in float32, in place, what ONNX Runtime's CPU provider cannot compute in bfloat16.

    Returns:
        How many nodes were changed; 0 also if some have to stay in bfloat16, for then none is.
    """
    kernels = bfloat16_kernels()
    nodes = [n for n in model.graph.all_nodes() if _touches(n) and not (n.domain == "" and n.op_type in kernels)]
    if not all(n.domain == "" and n.op_type in EXACT | _COMPARES | _ROUNDS for n in nodes):
        return 0
    wide: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == ir.DataType.BFLOAT16:
                node.replace_input_with(index, _widened(node, value, wide))
        for output in node.outputs:
            if output.dtype == ir.DataType.BFLOAT16:
                _narrowed(node, output, wide)
    return len(nodes)


def _touches(node: ir.Node) -> bool:
    return any(v is not None and v.dtype == ir.DataType.BFLOAT16 for v in (*node.inputs, *node.outputs))


def _widened(node: ir.Node, value: ir.Value, wide: dict[ir.Value, ir.Value]) -> ir.Value:
    """The value in float32, from a cast before `node` that later nodes share."""
    if value not in wide:
        cast = _cast(value, ir.DataType.FLOAT)
        producer = value.producer()
        graph = node.graph if producer is None or producer.graph is None else producer.graph
        assert graph is not None
        if producer is None or producer.graph is None:
            graph.insert_before(graph[0], cast)
        else:
            graph.insert_after(producer, cast)
        wide[value] = cast.outputs[0]
    return wide[value]


def _narrowed(node: ir.Node, output: ir.Value, wide: dict[ir.Value, ir.Value]) -> None:
    """Let the node give float32, and put a cast to bfloat16 in the place of its output."""
    assert node.graph is not None
    users = list(output.uses())
    output.type = ir.TensorType(ir.DataType.FLOAT)
    cast = _cast(output, ir.DataType.BFLOAT16)
    narrow = cast.outputs[0]
    node.graph.insert_after(node, cast)
    exact = node.op_type in EXACT
    for user, index in users:
        if exact and user.op_type == "Cast" and user.outputs[0].dtype == ir.DataType.FLOAT:
            ir.convenience.replace_all_uses_with(user.outputs[0], output)
            if not user.outputs[0].is_graph_output():
                user.graph.remove(user, safe=True)  # type: ignore[union-attr]
                continue
        user.replace_input_with(index, narrow)
    _as_outputs(node.graph, output, narrow)
    if exact:
        wide[narrow] = output
    if not narrow.uses() and not narrow.is_graph_output():
        node.graph.remove(cast, safe=True)


def _as_outputs(graph: ir.Graph | ir.Function, old: ir.Value, new: ir.Value) -> None:
    """Outputs of the graph keep their names and types."""
    if not old.is_graph_output():
        return
    old.name, new.name = f"{old.name}_float32", old.name
    for index, value in enumerate(graph.outputs):
        if value is old:
            graph.outputs[index] = new


def _cast(value: ir.Value, to: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], {"to": int(to)})
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(to), value.shape
    return node
