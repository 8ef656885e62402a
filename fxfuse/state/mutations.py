"""Finds what a program writes to in place that outlives a call: buffers, parameters, constants and inputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, GraphModule, Node

from fxfuse.graph.source import source_line
from fxfuse.graph.view import mutated, storage_roots
from fxfuse.torch_seams import HigherOrderOperator

# torch 2.11 has no kind for written parameters.
_PARAMETER = [kind] if (kind := getattr(OutputKind, "PARAMETER_MUTATION", None)) is not None else []
WRITES = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION, *_PARAMETER)
STATE = (InputKind.BUFFER, InputKind.PARAMETER, InputKind.CONSTANT_TENSOR)


@dataclass(frozen=True)
class Mutation:
    """One tensor that is written to."""

    placeholder: str
    kind: InputKind
    target: str
    """The path of a buffer or constant in its module, the name of an input."""
    source: str | None
    """The model's line that writes to it."""


def mutations(program: ExportedProgram) -> list[Mutation]:
    """What the program may write to: what its signature says, and what operators in its graph write to in place.

    A write to something that may be a view of a buffer counts here. It may turn out to be a copy; that is known only
    once torch has functionalised the program (`fxfuse.state.lift`).
    """
    graph = program.graph
    written: dict[str, str | None] = {}
    producers = {n.name: n for n in graph.nodes}
    for spec in program.graph_signature.output_specs:
        if spec.kind in WRITES:
            name = _placeholder(program, str(spec.target))
            node = producers.get(getattr(spec.arg, "name", ""))
            written.setdefault(name, source_line(node) if node is not None else None)
    for node in graph.nodes:
        for root in in_place(program.graph_module, graph, node):
            written.setdefault(root.name, source_line(_writer(program.graph_module, node)))
    specs = {getattr(s.arg, "name", ""): s for s in program.graph_signature.input_specs}
    return [
        Mutation(name, specs[name].kind, str(specs[name].target or name), line)
        for name, line in written.items()
        if name in specs
    ]


def in_place(module: GraphModule, graph: Graph, node: Node) -> set[Node]:
    """The inputs of `graph` that this node may write to, itself or in a subgraph that it runs."""
    if node.op != "call_function":
        return set()
    found = mutated(node)
    if isinstance(node.target, HigherOrderOperator):
        for sub in _subgraphs(module, node):
            if any(in_place(sub, sub.graph, n) for n in sub.graph.nodes):
                for operand in node.all_input_nodes:
                    found |= storage_roots(operand)
    return {n for n in found if n.op == "placeholder"}


def _subgraphs(module: GraphModule, node: Node) -> list[GraphModule]:
    references = [i for i in node.all_input_nodes if i.op == "get_attr"]
    found = [getattr(module, str(reference.target), None) for reference in references]
    return [sub for sub in found if isinstance(sub, GraphModule)]


def _writer(module: GraphModule, node: Node) -> Node:
    """The node that writes: `node`, or the first one that does in a subgraph that it runs."""
    for sub in _subgraphs(module, node):
        for inner in sub.graph.nodes:
            if in_place(sub, sub.graph, inner):
                return _writer(sub, inner)
    return node


def _placeholder(program: ExportedProgram, target: str) -> str:
    """The name of the input that holds the buffer of this path; for an input of the model's own, its own name."""
    for spec in program.graph_signature.input_specs:
        if spec.target == target and spec.kind in STATE:
            return str(getattr(spec.arg, "name", target))
    return target
