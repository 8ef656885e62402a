"""A decoder's graph in a few nodes, which has the inputs and outputs of a real one and computes nothing."""

from __future__ import annotations

import onnx_ir as ir

HEADS, SIZE, VOCABULARY = 2, 8, 16


def decoder(
    length: int | str = "past", *, layers: int = 2, value_size: int = SIZE, heads: int | str = HEADS
) -> ir.Model:
    """A cache of this length that comes out as it went in; where it is "past", one that is called longer."""
    ids = ir.val("input_ids", ir.DataType.INT64, ["batch", "new"])
    weights = ir.tensor([[0.0] * VOCABULARY] * 64, ir.DataType.FLOAT, name="weights")
    table = ir.val("weights", ir.DataType.FLOAT, [64, VOCABULARY], const_value=weights)
    logits = ir.node("Gather", [table, ids])
    logits.outputs[0].name, logits.outputs[0].dtype = "logits", ir.DataType.FLOAT
    logits.outputs[0].shape = ir.Shape(["batch", "new", VOCABULARY])
    inputs, nodes = [ids], [logits]
    for layer in range(layers):
        for what, size in (("key", SIZE), ("value", value_size)):
            past = ir.val(f"past_key_values.{layer}.{what}", ir.DataType.FLOAT, ["batch", heads, length, size])
            node = ir.node("Identity", [past])
            after = "past + new" if length == "past" else length
            node.outputs[0].name, node.outputs[0].dtype = f"present.{layer}.{what}", ir.DataType.FLOAT
            node.outputs[0].shape = ir.Shape(["batch", heads, after, size])
            inputs.append(past)
            nodes.append(node)
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=[table], opset_imports={"": 24}, name="decoder")
    return ir.Model(graph, ir_version=10)
