"""Where on booleans, written with And, Or and Not.

ONNX Runtime's CPU provider has no boolean kernel of Where (its `Where` lists float, int and string types only:
https://github.com/microsoft/onnxruntime/blob/main/docs/OperatorKernels.md), so that a model which combines masks by
`where` or `masked_fill` does not load. Superfluous once it has one.
"""

from __future__ import annotations

import onnx_ir as ir

from fxfuse.onnx.pieces import TypedTape


def without_boolean_where(model: ir.Model) -> int:
    """Rewrite every boolean ``Where(c, x, y)`` as ``(c and x) or (not c and y)``, in place; returns how many."""
    found = [n for n in model.graph.all_nodes() if n.op_type == "Where" and n.domain == "" and _boolean(n)]
    for node in found:
        condition, chosen, otherwise = node.inputs
        (result,) = node.outputs
        tape, graph = TypedTape(), node.graph
        assert graph is not None
        kept = tape.add("And", [condition, chosen], dtype=ir.DataType.BOOL)
        opposite = tape.add("Not", [condition], dtype=ir.DataType.BOOL)
        left = tape.add("And", [opposite, otherwise], dtype=ir.DataType.BOOL)
        either = tape.op("Or", [kept, left], name=node.name)
        ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, [result], [either])
    return len(found)


def _boolean(node: ir.Node) -> bool:
    known = [v.dtype for v in (*node.outputs, *node.inputs[1:]) if v is not None and v.dtype is not None]
    return ir.DataType.BOOL in known
