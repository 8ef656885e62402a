"""Scales the queries of an Attention before it, where it would scale their products with the keys: ONNX Runtime's CPU
kernel decodes faster so.

    q ── Attention(scale = c)      becomes      q ── Mul(c) ── Attention(scale = 1)

(c·q)·k = c·(q·k). Both sides round once more than the products do, and not at all where c is a power of two. It is done
in float32 only: half precision would round the scaled queries to 16 bits, while scores are added up in float32.

A decoding step has one query a head, so its scores are a product of a vector and a matrix. MLAS, ONNX Runtime's library
of kernels, has one for that which reads the keys as they lie, but only without a factor on the product. With a factor
it first copies all keys into panels, once for each head, and the Attention of a step takes up to twice the time.

Source: MlasSgemmOperation in onnxruntime/core/mlas/lib/sgemm.cpp, "the special case of a small M".
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from fxfuse.onnx.pieces import initializer


def scale_queries(model: ir.Model) -> int:
    """Rewrites, in place, every Attention in float32 whose scale is known and not 1. Attentions that read the same
    queries share the product.

    Returns:
        How many were rewritten.
    """
    count = 0
    scaled: dict[tuple[ir.Value, float], ir.Value] = {}
    for node in [node for node in model.graph if node.op_type == "Attention" and node.domain == ""]:
        query, scale = node.inputs[0], scale_of(node)
        if query is None or query.dtype != ir.DataType.FLOAT or scale in (None, 1.0):
            continue
        assert scale is not None
        if (query, scale) not in scaled:
            scaled[query, scale] = _product(model.graph, node, query, scale)
        node.replace_input_with(0, scaled[query, scale])
        node.attributes.add(ir.AttrFloat32("scale", 1.0))
        count += 1
    return count


def scale_of(node: ir.Node) -> float | None:
    """What an Attention multiplies its scores by; by default 1/√head_dim. None where the graph does not say
    head_dim."""
    if "scale" in node.attributes:
        return node.attributes["scale"].as_float()
    for value, heads in zip(node.inputs[:2], ("q_num_heads", "kv_num_heads"), strict=True):
        shape = None if value is None else value.shape
        if shape is not None and isinstance(size := shape[-1], int):
            return 1 / math.sqrt(size // node.attributes[heads].as_int() if len(shape) == 3 else size)
    return None


def _product(graph: ir.Graph, node: ir.Node, query: ir.Value, scale: float) -> ir.Value:
    """`query` times `scale`, before `node`."""
    factor = np.float32(scale)
    product = ir.node("Mul", [query, initializer(graph, f"fxfuse.scale_{factor}", ir.tensor(factor))])
    product.outputs[0].type, product.outputs[0].shape = query.type, query.shape
    graph.insert_before(node, product)
    return product.outputs[0]
