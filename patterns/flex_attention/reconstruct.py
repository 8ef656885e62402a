"""Block lists made part of the mask function: mask'(b, h, q, kv) = listed[b, h, q / Q, kv / K] & mask | full[…].

That is what the compiled kernel computes of a `BlockMask`: nothing of a block that no list names, everything of one
that is listed as full. It is done to a copy of the program, where the lists do not follow from the function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from fxfuse.graph.emit import KEPT_META
from fxfuse.graph.splice import trace
from fxfuse.graph.view import fake
from fxfuse.patterns.flex_attention.block_lists import check_block_mask
from fxfuse.patterns.flex_attention.calls import Flex, block_mask_names, flex
from fxfuse.patterns.flex_attention.capturing.one_block import LARGE
from fxfuse.recognise.probe import Probe

_aten = torch.ops.aten


def reconstruct(program: ExportedProgram, ask: Probe) -> None:
    """Give every call whose lists say something else than its function a function that says both, in place."""
    for node in list(program.graph.nodes):
        call = flex(node)
        if call is not None and check_block_mask(call, ask, "reconstruct") is not None:
            _reconstruct(call, program.graph_module)
    program.graph_module.recompile()


def _reconstruct(call: Flex, owner: GraphModule) -> None:
    lists = call.block_mask
    block = (lists["BLOCK_SIZE.0"], lists["BLOCK_SIZE.1"])
    full = ("full_kv_num_blocks", "full_kv_indices") if lists.get("full_kv_num_blocks") is not None else None
    tables = []
    for counts, indices in (("kv_num_blocks", "kv_indices"), *((full,) if full else ())):
        inputs = (lists[counts], lists[indices], call.query, call.key)
        tables.append(_inserted(call.node, trace(_membership(block), inputs), inputs))
    name = f"{call.node.name}_blocks_and_mask"
    owner.add_submodule(name, GraphModule(owner, _both(call, tables, block)))
    graph = call.node.graph
    with graph.inserting_before(call.node):
        mask = graph.get_attr(name)
        one = graph.call_function(_aten.ones.default, ([1, 1, 1],), {"dtype": torch.int32})
        zero = graph.call_function(_aten.zeros.default, ([1, 1, 1, 1],), {"dtype": torch.int32})
    first = fake(call.query)
    for new, shape in ((one, (1, 1, 1)), (zero, (1, 1, 1, 1))):
        new.meta["val"] = first.new_empty(shape, dtype=torch.int32)
    plain: dict[str, Any] = dict.fromkeys(block_mask_names()) | {
        **{k: lists[k] for k in ("seq_lengths.0", "seq_lengths.1")},
        "kv_num_blocks": one,
        "kv_indices": zero,
        "q_num_blocks": one,
        "q_indices": zero,
        "BLOCK_SIZE.0": LARGE,
        "BLOCK_SIZE.1": LARGE,
    }
    args = list(call.node.args)
    args[4] = (*(plain[k] for k in block_mask_names()), mask)
    args[8:9] = [(*call.mask_buffers, *tables)]
    call.node.args = tuple(args)


def _membership(block: tuple[int, int]) -> Any:
    """Counts [B, H, rows] and indices [B, H, rows, n] as a table [B, H, rows, columns] that covers q and k."""

    def membership(counts: torch.Tensor, indices: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        columns = torch.arange((key.shape[2] + block[1] - 1) // block[1], device=counts.device)
        read = torch.arange(indices.shape[-1], device=counts.device) < counts[..., None]
        return ((indices[..., None] == columns) & read[..., None]).any(-2)

    return membership


def _inserted(before: Node, body: Graph, inputs: tuple[Node, ...]) -> Node:
    """The result of `body`, copied in before a node."""
    env: dict[Node, Any] = {}
    given = iter(inputs)
    for node in body.nodes:
        if node.op == "placeholder":
            env[node] = next(given)
        elif node.op == "output":
            result = node.args[0]
            found: Node = env[result[0] if isinstance(result, (tuple, list)) else result]
            return found
        else:
            with before.graph.inserting_before(before):
                env[node] = before.graph.node_copy(node, env.__getitem__)
            env[node].meta = {**{k: before.meta[k] for k in KEPT_META if k in before.meta}, "val": node.meta["val"]}
    raise AssertionError("a traced graph has an output")


def _both(call: Flex, tables: list[Node], block: tuple[int, int]) -> Graph:
    """The new mask function; a table of one batch or head is read at 0."""
    graph = Graph()
    env: dict[Node, Any] = {}
    own = [n for n in call.mask_mod.graph.nodes if n.op == "placeholder"]
    index = fake(call.query).new_empty((), dtype=torch.int32)
    for node in own:
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    captured = [graph.placeholder(f"blocks_{i}") for i in range(len(tables))]
    for placeholder, table in zip(captured, tables, strict=True):
        placeholder.meta["val"] = fake(table)

    def apply(target: Any, *args: Any, dtype: torch.dtype = torch.bool) -> Node:
        node = graph.call_function(target, args)
        node.meta["val"] = index.new_empty((), dtype=dtype)
        return node

    result: Any = None
    for node in call.mask_mod.graph.nodes:
        if node.op == "output":
            result = env[node.args[0][0] if isinstance(node.args[0], (tuple, list)) else node.args[0]]
        elif node.op == "get_attr":
            env[node] = graph.get_attr(f"{_path(call)}.{node.target}")
            env[node].meta = dict(node.meta)
        elif node.op != "placeholder":
            env[node] = graph.node_copy(node, env.__getitem__)
    b, h, q, kv = (env[n] for n in own[:4])
    row, column = (
        apply(_aten.div.Tensor_mode, i, size, dtype=torch.int32) for i, size in ((q, block[0]), (kv, block[1]))
    )
    for node in (row, column):
        node.kwargs = {"rounding_mode": "floor"}
    found = []
    for placeholder, table in zip(captured, tables, strict=True):
        at = [
            apply(_aten.mul.Tensor, i, 0, dtype=torch.int32) if isinstance(n, int) and n == 1 else i
            for i, n in zip((b, h), fake(table).shape[:2], strict=True)
        ]
        found.append(apply(_aten.index.Tensor, placeholder, [*at, row, column]))
    result = apply(_aten.__and__.Tensor, found[0], result)
    if len(found) > 1:
        result = apply(_aten.__or__.Tensor, result, found[1])
    graph.output(result)
    return graph


def _path(call: Flex) -> str:
    """Where the mask function hangs in the program."""
    reference: Any = call.node.args[4]
    return str(reference[-1].target)
