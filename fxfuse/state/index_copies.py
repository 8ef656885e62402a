"""Rewrites slices of state that begin at a number read from a tensor, so that the graph says where that number comes
from.

    n = start.item()                                     slots = arange(S) + start
    cache[:, :, n : n + S] = new      is the same as     cache[:, :, slots] = new        for n >= 0

`start.item()` gives the graph a size of which nothing says that it comes from `start`. If the slots are counted from
the tensor itself, it is there to be read: by the pattern for writes to a cache, and as an input of TensorScatter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from fxfuse.graph.view import argument, fake, op_name, size_text, tensor
from fxfuse.torch_seams import entered


def slices_as_index_copies(program: ExportedProgram) -> None:
    """Rewrites, in place, every `slice_scatter` that begins at such a number as an `index_copy`.

    Args:
        program: writes nothing in place.
    """
    for node in list(program.graph.nodes):
        if op_name(node) != "slice_scatter" or argument(node, "step") not in (None, 1):
            continue
        start = _read_from(program, argument(node, "start"))
        if start is None:
            continue
        past, new, axis = node.args[0], argument(node, "src"), argument(node, "dim") or 0
        if op_name(new) == "copy" and _shape(new.args[1]) == _shape(new):  # it reads the slice only to write over it
            new = new.args[1]
        with program.graph.inserting_before(node):
            add = _adder(program.graph)
            length: Any = fake(new).shape[axis]
            count = add(torch.ops.aten.sym_size.int, new, axis) if isinstance(length, torch.SymInt) else length
            steps = add(torch.ops.aten.arange.default, count, device=fake(start).device)
            first = add(torch.ops.aten.reshape.default, start, [1])
            slots = add(torch.ops.aten.add.Tensor, steps, first)
            written = add(torch.ops.aten.index_copy.default, past, axis, slots, new)
        for found in (written, slots, first, steps):
            found.meta |= {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta")}
        source, name = argument(node, "src"), node.name
        node.replace_all_uses_with(written)
        program.graph.erase_node(node)
        written.name = name  # the signature knows it by that
        for unread in (source, *source.all_input_nodes[:1]) if source is not new else ():
            if unread.op == "call_function" and not unread.users:
                program.graph.erase_node(unread)
    program.graph_module.recompile()


def _read_from(program: ExportedProgram, start: Any) -> Node | None:
    """The tensor from which the number `start` was read, if it is known not to be negative; None otherwise."""
    if not isinstance(start, Node) or op_name(start) not in ("item", "_local_scalar_dense"):
        return None
    source, value = start.args[0], start.meta.get("val")
    if not isinstance(source, Node) or tensor(source) is None or not isinstance(value, torch.SymInt):
        return None
    bounds = program.range_constraints.get(value.node.expr)
    known = bounds is not None and bool(bounds.lower >= 0)
    return source if known and fake(source).dtype in (torch.int32, torch.int64) else None


def _shape(node: Any) -> tuple[str, ...]:
    return tuple(map(size_text, fake(node).shape)) if isinstance(node, Node) and tensor(node) is not None else ()


def _adder(graph: Graph) -> Callable[..., Node]:
    def add(target: Any, *args: Any, **kwargs: Any) -> Node:
        node: Node = graph.call_function(target, args, kwargs)
        operands, options = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        mode = next(v.fake_mode for n in node.graph.nodes if hasattr(v := n.meta.get("val"), "fake_mode"))
        with entered(mode), torch.no_grad():
            node.meta["val"] = target(*operands, **options)
        return node

    return add
