"""Programs that were edited after their capture, by nodes without a value (``meta["val"]``): the values are filled
in."""

from __future__ import annotations

import copy

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from fxfuse.quiet import shared_specs
from fxfuse.torch_seams import entered, schema_of, set_graph_module


@shared_specs()
def with_values(program: ExportedProgram) -> ExportedProgram:
    """The program, with a value for every node. It is a copy if some had none, else the program itself.

    torch's verifier wants a value in every node, and a pass that inserts nodes may give none: transformers' exporter
    does so for `detach` (`_fix_detach_inplace` in transformers/exporters/exporter_onnx.py).
    """
    if not any(_unknown(node) for module in _graphs(program.graph_module) for node in module.graph.nodes):
        return program
    module = copy.deepcopy(program.graph_module)
    mode = next(value.fake_mode for node in module.graph.nodes if hasattr(value := node.meta.get("val"), "fake_mode"))
    for old, new in zip(_graphs(program.graph_module), _graphs(module), strict=True):
        for old_node, node in zip(old.graph.nodes, new.graph.nodes, strict=True):
            node.name = old_node.name  # copying renames a node called `input`, but the signature knows it by that name
            if _unknown(node):
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                with entered(mode), torch.no_grad():
                    node.meta["val"] = node.target(*args, **kwargs)
    result = copy.copy(program)
    set_graph_module(result, module)
    return result


def _unknown(node: Node) -> bool:
    returns = getattr(schema_of(node.target), "returns", (None,))
    return node.op == "call_function" and "val" not in node.meta and len(returns) > 0


def _graphs(module: GraphModule) -> list[GraphModule]:
    return [m for m in module.modules() if isinstance(m, GraphModule)]
