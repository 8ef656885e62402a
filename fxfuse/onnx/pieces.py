"""What rewrites of an ONNX graph put into it again and again: constants, typed nodes, heads taken apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


class TypedTape(ir.tape.Tape):
    """Records nodes that go into a graph at one place (``graph.insert_before(node, tape.nodes)``), with their types.

    A tape of onnx_ir leaves types and shapes open, and what reads the graph afterwards goes by them.
    """

    def add(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        dtype: ir.DataType | None = ir.DataType.INT64,
        shape: ir.Shape | None = None,
    ) -> ir.Value:
        """The output of one more node."""
        value = ir.Value(shape=shape, type=None if dtype is None else ir.TensorType(dtype))
        return self.op(op, inputs, attributes, output=value)


def initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """The initializer of that name; it is made of `tensor` if there is none yet."""
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, tensor.dtype, tensor.numpy().shape, const_value=tensor))
    return graph.initializers[name]


def constant(graph: ir.Graph, numbers: list[int]) -> ir.Value:
    """An initializer of int64 that holds these numbers; equal lists share one."""
    name = "fxfuse." + "_".join(str(n).replace("-", "minus") for n in numbers)
    return initializer(graph, name, ir.tensor(np.array(numbers, np.int64), name=name))


def counted(graph: ir.Graph, count: int) -> ir.Value:
    """An initializer of 0, 1, …, count - 1."""
    return initializer(graph, f"fxfuse.slots_{count}", ir.tensor(np.arange(count, dtype=np.int64)))


def heads_apart(
    graph: ir.Graph, add: Callable[[str, list[Any], Any], ir.Value], value: ir.Value, heads: int
) -> ir.Value:
    """[B, S, H·D] as [B, H, S, D].

    Args:
        add: puts a node into the graph, of an operator, inputs and attributes, and gives its output.
    """
    apart = add("Reshape", [value, constant(graph, [0, 0, heads, -1])], None)
    return add("Transpose", [apart], {"perm": [0, 2, 1, 3]})


def heads_together(graph: ir.Graph, add: Callable[[str, list[Any], Any], ir.Value], value: ir.Value) -> ir.Value:
    """[B, H, S, D] as [B, S, H·D]; `add` as in `heads_apart`."""
    together = add("Transpose", [value], {"perm": [0, 2, 1, 3]})
    return add("Reshape", [together, constant(graph, [0, 0, -1])], None)


def takes_one_token(graph: ir.Graph) -> bool:
    """Is the graph made for one new token in each row?"""
    shapes = [value.shape for value in graph.inputs if value.name == "input_ids"]
    return bool(shapes) and shapes[0] is not None and shapes[0][1] == 1
