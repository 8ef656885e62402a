"""Lifted states that are counters: a row of consecutive numbers, to all of which every call adds one and the same step.

TorchTune's `KVCache` keeps the positions that come next, [0, 1, …, T-1], and adds the number of new keys to each. If
the caller hands back what the call before gave, the row stays one of consecutive numbers, and its first number says all
of it. So what reads the row is made to read `row[0] + [0, 1, …, T-1]`. Then patterns see that the positions follow one
another, which they could not see of an input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from fxfuse.graph.view import fake, op_name
from fxfuse.torch_seams import entered, fake_mode_of


def count_from_first(program: ExportedProgram, placeholder: Node, initial: torch.Tensor, final: Node) -> None:
    """Rewrites, in place, what reads the state `placeholder`, if that is such a counter.

    Args:
        placeholder: the input that holds the state.
        initial: what it holds before any call.
        final: the node that is the state after the call.
    """
    integer = not (initial.dtype.is_floating_point or initial.dtype.is_complex or initial.dtype == torch.bool)
    if initial.dim() != 1 or not integer or initial.is_meta or not _moves(final, placeholder):
        return
    T = initial.shape[0]
    if T == 0 or not torch.equal(initial, initial[0] + torch.arange(T, dtype=initial.dtype, device=initial.device)):
        return
    graph, value = program.graph, fake(placeholder)
    readers = list(placeholder.users)
    after = list(graph.find_nodes(op="placeholder"))[-1]

    def add(point: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        with graph.inserting_after(point):
            node: Node = graph.call_function(target, args, kwargs)
        operands = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with entered(fake_mode_of(value)), torch.no_grad():
            node.meta["val"] = target(*operands[0], **operands[1])
        return node

    first = add(after, torch.ops.aten.select.int, placeholder, 0, 0)
    steps = add(first, torch.ops.aten.arange.default, T, dtype=initial.dtype, device=initial.device)
    row = add(steps, torch.ops.aten.add.Tensor, steps, first)
    for reader in readers:
        reader.replace_input_with(placeholder, row)
    program.graph_module.recompile()


def _moves(final: Node, placeholder: Node) -> bool:
    """Is `final` the state and one number that is added to all of it?"""
    if op_name(final) != "add" or len(final.args) != 2 or final.args[0] is not placeholder or final.kwargs:
        return False
    step = final.args[1]
    value = step.meta.get("val") if isinstance(step, Node) else step
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
