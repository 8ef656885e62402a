"""Exported programs: checking one, and copying it so that the caller's is never changed."""

from __future__ import annotations

import copy

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from fxfuse.errors import FxfuseError
from fxfuse.quiet import shared_specs
from fxfuse.torch_seams import drop_guards_code, guards_code, share_codegen


def check_program(program: object) -> ExportedProgram:
    """The program, if it is one that can be fused.

    Raises:
        FxfuseError: not an `ExportedProgram`, or one that already holds fxfuse ops.
    """
    if not isinstance(program, ExportedProgram):
        raise FxfuseError(
            f"expected a torch.export.ExportedProgram, got {type(program).__name__}",
            where="program",
            hint="capture the module first: torch.export.export(module, args)",
        )
    for node in program.graph.nodes:
        if node.op == "call_function" and str(getattr(node.target, "namespace", "")) == "fxfuse":
            raise FxfuseError(
                f"the program is fused already: it holds {node.target}",
                where=f"node {node.name}",
                hint="fuse the program as torch.export captured it",
            )
    return program


@shared_specs()
def copy_program(program: ExportedProgram) -> ExportedProgram:
    """A program with graphs, subgraphs and a signature of its own; weights and constants are shared."""
    copied = ExportedProgram(
        root=program.graph_module,
        graph=_copied(program.graph),
        graph_signature=copy.deepcopy(program.graph_signature),
        state_dict=program.state_dict,
        range_constraints=copy.copy(program.range_constraints),
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=dict(program.constants),
        verifiers=program.verifiers,
    )
    copied.graph_module.meta.update(program.graph_module.meta)
    _own_subgraphs(copied.graph_module)
    return copied


def name_outputs(program: ExportedProgram) -> None:
    """Have the signature name what the program returns now."""
    returned = program.graph.output_node().args[0]
    assert isinstance(returned, (list, tuple))
    for spec, value in zip(program.graph_signature.output_specs, returned, strict=True):
        if isinstance(value, Node) and getattr(spec.arg, "name", None) is not None:
            spec.arg.name = value.name


def drop_unused_subgraphs(program: ExportedProgram) -> None:
    """Take out the subgraphs that no node refers to any more.

    Not `delete_all_unused_submodules`: it goes by full paths, and takes the submodules of a subgraph for unused.
    """
    used = {str(n.target).partition(".")[0] for n in program.graph.nodes if n.op == "get_attr"}
    root = program.graph_module
    for name, child in list(root.named_children()):
        if isinstance(child, GraphModule) and name not in used:
            delattr(root, name)


def _copied(graph: Graph) -> Graph:
    """The graph with the same names, metadata and calling convention."""
    result = Graph()
    seen: dict[Node, Node] = {}
    result.output(result.graph_copy(graph, seen))
    old_output = graph.output_node()
    result.output_node().meta = copy.copy(old_output.meta)
    seen[old_output] = result.output_node()
    for old, new in seen.items():
        new.name = old.name  # not `_rename`: it refuses names of Python builtins, and an input may be called `input`
    share_codegen(result, graph)
    return result


def _own_subgraphs(root: torch.nn.Module) -> None:
    """Subgraphs are copied too, and theirs: what is written to a copy's is not written to the caller's."""
    for name, child in list(root.named_children()):
        if not isinstance(child, GraphModule):
            if type(child) is torch.nn.Module:  # a part of a path, made by `GraphModule` for this copy
                _own_subgraphs(child)
            continue
        own = GraphModule(child, _copied(child.graph), type(child).__name__)
        own.meta.update(child.meta)
        own.train(child.training)
        _own_subgraphs(own)
        setattr(root, name, own)


def without_guards(program: ExportedProgram) -> ExportedProgram:
    """The program, which no more asks of its inputs what held for the sample.

    A decomposition runs these questions, and what it concludes stays: of `s == min(64, s)`, with Python's own `min`,
    that `s` is 64, where that is the sample's (`_convert_guards_code_to_fn` in torch/export/_unlift.py).
    """
    if not guards_code(program):
        return program
    result = copy.copy(program)
    drop_guards_code(result)
    return result
