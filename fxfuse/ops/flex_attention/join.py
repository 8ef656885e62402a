"""The two halves of a FlexAttention, and what stands between them, as one node of ai.onnx.preview.

    FlexScores(Q, K) -> scores, b, h, q, kv         FlexAttention(Q, K, V)
    the mod's own operators                    ->       score_mod  (scores) -> scores, positions from its shape
    FlexOutput(scores, V)                               prob_mod   rows that see nothing give 0

Everything that is computed from the scores or from a position goes into `score_mod`. What the mod captures (tables,
document ids, sizes) stays outside, and the subgraph reads it from there. For a row of -inf throughout the operator's
softmax gives NaN, and flex_attention 0: `prob_mod` turns the one into the other. A row whose scores are NaN gives 0
too, for the two cannot be told apart there.

https://onnx.ai/onnx/operators/onnx_aionnxpreview_FlexAttention.html
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from fxfuse.errors import FxfuseError
from fxfuse.ops.flex_attention.halves import DOMAIN, OUTPUT, SCORES

PREVIEW = "ai.onnx.preview"
INDICES = ("b", "h", "q", "kv")
Values = dict[ir.Value, ir.Value]


def join_flex_attention(model: ir.Model) -> int:
    """Make one node of every pair of halves, in place; returns how many.

    Raises:
        FxfuseError: halves that belong to no one call.
    """
    outputs = [n for n in model.graph if (n.domain, n.op_type) == (DOMAIN, OUTPUT)]
    superfluous: dict[ir.Node, None] = {}
    for output in outputs:
        scores, between = _mod(output)
        superfluous |= dict.fromkeys([scores, *between])
        node = _joined(scores, between, output)
        ir.convenience.replace_nodes_and_values(
            model.graph, output, [output], [node], list(output.outputs), list(node.outputs)
        )
    order = {node: i for i, node in enumerate(model.graph)}
    for node in sorted(superfluous, key=order.__getitem__, reverse=True):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            model.graph.remove(node, safe=True)
    if outputs:
        model.opset_imports[PREVIEW] = 1
        model.opset_imports.pop(DOMAIN, None)
    return len(outputs)


def _mod(output: ir.Node) -> tuple[ir.Node, list[ir.Node]]:
    """The other half, and what is computed of its outputs on the way, in order."""
    before: set[ir.Node] = set()
    stack = [value.producer() for value in output.inputs[:1] if value is not None]
    while stack:
        node = stack.pop()
        if node is None or node in before or (node.domain, node.op_type) == (DOMAIN, OUTPUT):
            continue
        before.add(node)
        stack.extend(value.producer() for value in _read(node))
    halves = [n for n in before if (n.domain, n.op_type) == (DOMAIN, SCORES)]
    if len(halves) != 1 or output.graph is None:
        raise FxfuseError(f"{len(halves)} calls where the mod of one was expected", where=f"node {output.name}")
    reached, between = {halves[0]}, []
    for node in output.graph:
        if node in before and node not in reached and any(value.producer() in reached for value in _read(node)):
            reached.add(node)
            between.append(node)
    return halves[0], between


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """The values that a node and its subgraphs read."""
    yield from (value for value in node.inputs if value is not None)
    for graph in _subgraphs(node):
        for inner in graph.all_nodes():
            yield from (value for value in inner.inputs if value is not None)


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    return [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]


def _joined(scores: ir.Node, between: Sequence[ir.Node], output: ir.Node) -> ir.Node:
    """The joined node; its output has the name of the second half's."""
    (y,) = output.outputs
    raw = scores.outputs[0]
    name = y.name or "flex_attention"
    modded, values = output.inputs[:2]
    attributes: list[ir.Attr] = [ir.AttrFloat32("scale", scores.attributes["scale"].as_float())]
    if modded is not raw:
        attributes.append(ir.AttrGraph("score_mod", _score_mod(scores, between, modded, name)))
        attributes.append(ir.AttrGraph("prob_mod", _prob_mod(raw, name)))
    node = ir.Node(PREVIEW, "FlexAttention", [*scores.inputs, values], attributes, version=1, name=output.name)
    node.metadata_props.update(output.metadata_props)
    _like(node.outputs[0], y, y.name)
    return node


def _score_mod(scores: ir.Node, between: Sequence[ir.Node], result: ir.Value | None, name: str) -> ir.Graph:
    raw, *positions = scores.outputs
    given = _like(ir.Value(), raw, f"{name}.scores")
    known: Values = {raw: given}
    nodes: list[ir.Node] = []
    read = {value for node in between for value in _read(node)}
    for axis, position in enumerate(positions):
        if position in read or position is result:
            nodes += _position(given, axis, f"{name}.{INDICES[axis]}")
            known[position] = _like(nodes[-1].outputs[0], position, nodes[-1].outputs[0].name)
    for node in between:
        nodes.append(_copy(node, known, name))
    assert result is not None
    return ir.Graph([given], [known[result]], nodes=nodes, name=f"{name}.score_mod")


def _position(scores: ir.Value, axis: int, name: str) -> list[ir.Node]:
    """Nodes that compute 0, 1, … along one axis of the scores, with as many axes as the scores have."""
    shape = ir.node("Shape", [scores], {"start": axis, "end": axis + 1})
    size = ir.node("Squeeze", shape.outputs)
    zero, one = _constant(0), _constant(1)
    count = ir.node("Range", [zero.outputs[0], size.outputs[0], one.outputs[0]])
    target = _constant([-1 if d == axis else 1 for d in range(4)])
    laid = ir.node("Reshape", [count.outputs[0], target.outputs[0]])
    return _named([shape, size, zero, one, count, target, laid], name)


def _prob_mod(raw: ir.Value, name: str) -> ir.Graph:
    given = _like(ir.Value(), raw, f"{name}.weights")
    nothing = ir.node("IsNaN", [given])
    dtype = raw.dtype or ir.DataType.FLOAT
    zero = ir.node("Constant", [], {"value": ir.tensor(0.0, dtype=dtype)})
    zero.outputs[0].type, zero.outputs[0].shape = ir.TensorType(dtype), ir.Shape([])
    kept = ir.node("Where", [nothing.outputs[0], zero.outputs[0], given])
    _named([nothing, zero, kept], f"{name}.prob_mod")
    result = _like(kept.outputs[0], raw, kept.outputs[0].name)
    return ir.Graph([given], [result], nodes=[nothing, zero, kept], name=f"{name}.prob_mod")


def _copy(node: ir.Node, known: Values, name: str) -> ir.Node:
    """A copy of a node of the mod for the subgraph. It gets new names, for a subgraph may not hide names around it."""
    copy = ir.Node(
        node.domain,
        node.op_type,
        [known.get(value, value) if value is not None else None for value in node.inputs],
        [_copied(attribute, known) for attribute in node.attributes.values()],
        overload=node.overload,
        num_outputs=len(node.outputs),
        version=node.version,
        name=f"{name}.{node.name}",
        metadata_props=dict(node.metadata_props),
    )
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        known[old] = _like(new, old, f"{name}.{old.name}")
    return copy


def _copied(attribute: Any, known: Mapping[ir.Value, ir.Value]) -> Any:
    if attribute.type != ir.AttributeType.GRAPH:
        return attribute
    graph = attribute.as_graph().clone(allow_outer_scope_values=True)
    for inner in graph.all_nodes():
        for i, value in enumerate(inner.inputs):
            if value in known:
                inner.replace_input_with(i, known[value])
    return ir.AttrGraph(attribute.name, graph)


def _constant(value: int | list[int]) -> ir.Node:
    return ir.node("Constant", [], {"value": ir.tensor(value, dtype=ir.DataType.INT64)})


def _named(nodes: list[ir.Node], name: str) -> list[ir.Node]:
    for i, node in enumerate(nodes):
        node.name = f"{name}_node_{i}"
        node.outputs[0].name = f"{name}_{i}"
    return nodes


def _like(value: ir.Value, other: ir.Value, name: str | None) -> ir.Value:
    value.name, value.type, value.shape = name, other.type, other.shape
    return value
