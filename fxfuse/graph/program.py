"""Exported programs: checking one, and copying it so that the caller's is never changed."""

from __future__ import annotations

import copy

import torch
from torch.export import ExportedProgram

from fxfuse.errors import FxfuseError


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


def copy_program(program: ExportedProgram) -> ExportedProgram:
    """A program with a graph and a signature of its own; weights and constants are shared."""
    graph = torch.fx.Graph()
    seen: dict[torch.fx.Node, torch.fx.Node] = {}
    result = graph.graph_copy(program.graph, seen)
    graph.output(result)
    old_output = program.graph.output_node()
    graph.output_node().meta = copy.copy(old_output.meta)
    seen[old_output] = graph.output_node()
    for old, new in seen.items():
        new.name = old.name  # not `_rename`: it refuses names of Python builtins, and an input may be called `input`
    graph._codegen = copy.deepcopy(program.graph._codegen)
    copied = ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=copy.deepcopy(program.graph_signature),
        state_dict=program.state_dict,
        range_constraints=copy.copy(program.range_constraints),
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
    copied.graph_module.meta.update(program.graph_module.meta)
    return copied
