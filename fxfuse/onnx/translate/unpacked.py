"""Integers that are kept several to a word, unpacked before torch.onnx sees the program.

GPTQ, AWQ and compressed-tensors keep eight integers of four bits in an int32, and unpack them whenever they are read.
Here PyTorch computes the integers that DequantizeLinear reads, by the calls and in the types of the graph, and the
program keeps the result, a byte each. So torch.onnx need not translate shifts, masks and reinterpreted bytes, for which
ONNX has operators only in part. `fxfuse.onnx.translate.packed` then writes two to a byte again. Meanwhile a model of W
weights holds W bytes beside the words, a quarter of what float32 would take.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node

from fxfuse.graph.program import copy_program
from fxfuse.graph.view import fake, is_float, is_pure, op_name
from fxfuse.recognise.kept import INNER, Kept
from fxfuse.state.functional import functionalise, restore
from fxfuse.state.mutations import mutations
from fxfuse.torch_seams import is_erased

_DEQUANTIZE = torch.ops.fxfuse.dequantize_linear.default
_INTEGERS = (0, 2)
"""Where the operator reads integers: x and its zero point."""
_INDEX = (2,)
"""Where `index_select` reads which rows it takes: those of GPTQ's act-order are sorted by their groups."""


def without_words(program: ExportedProgram) -> ExportedProgram:
    """The program with integers as constants, where DequantizeLinear reads integers computed only from kept tensors.

    Returns:
        A new program that shares the weights; `program` itself if there are no such integers.
    """
    if not any(node.target is _DEQUANTIZE for node in program.graph.nodes):
        return program
    result = copy_program(program)
    writes = functionalise(result.graph)
    held = Kept(result, frozen=True, written=frozenset(str(m.target) for m in mutations(result)))
    found = list(_computed(result, held))
    values = {source: value for _, _, source in found if (value := held.value(source)) is not None}
    kept = {source: _keep(result, source, value) for source, value in values.items()}
    for node, place, source in found:
        if source in kept:
            node.update_arg(place, kept[source])
    if not kept:
        return program
    restore(result.graph, writes)
    for source in kept:
        _erase_unread(source)
    result.graph.lint()
    result.graph_module.recompile()
    return result


def _computed(program: ExportedProgram, held: Kept) -> Iterator[tuple[Node, int, Node]]:
    """Where DequantizeLinear, or a choice of rows, reads integers that are computed of what the program keeps alone."""
    for node in program.graph.nodes:
        chooses = op_name(node) == "index_select" and is_float(node)
        for place in _INTEGERS if node.target is _DEQUANTIZE else _INDEX if chooses else ():
            source = node.args[place] if place < len(node.args) else None
            if not isinstance(source, Node) or source.op != "call_function" or op_name(source) in (INNER, "full"):
                continue
            if source in held:
                yield node, place, source


def _keep(program: ExportedProgram, source: Node, value: Tensor) -> Node:
    """A new constant of this value; its placeholder stands before the program's own inputs."""
    name = f"c_{source.name}_integers"
    first = next(iter(program.graph.nodes))
    with program.graph.inserting_before(first):
        node: Node = program.graph.placeholder(name)
    mode = getattr(fake(source), "fake_mode", None)
    assert mode is not None, "values of a captured program are fake"
    value = value.contiguous()
    node.meta["val"] = mode.from_tensor(value, static_shapes=True)
    spec = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), node.name)
    program.graph_signature.input_specs.insert(0, spec)
    program.constants[node.name] = value
    return node


def _erase_unread(source: Node) -> None:
    pending = [source]
    while pending:
        node = pending.pop()
        if node.op == "call_function" and is_pure(node) and not node.users and not is_erased(node):
            pending.extend(node.all_input_nodes)
            node.graph.erase_node(node)
