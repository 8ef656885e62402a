"""Two things that padding costs time for in a decoder's graph, made cheaper: looking padding up, and clearing its rows.

    attention_mask[b, t] by indices, [B, 1, 1, T]    becomes    Unsqueeze(attention_mask as bool)

    Reshape ─ Transpose ─ Where(sees nothing, 0, y) ─ Transpose ─ Reshape    becomes    Where on [B, S, H·D], as y lies

transformers makes its masks by asking a function of (row, head, query, key) for every element. The one for padding
looks into attention_mask: a GatherND over as many pairs of indices as there are keys. That the result is attention_mask
itself is read off the graph and decided for all sizes (`fxfuse.decoder.masks.decided`). And for rows that see no key at
all transformers puts 0 in the place of the attention's result, for which it takes the heads apart and together again:
the choice can as well be made for whole positions, where they lie.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fxfuse.decoder.masks.decided import Masks
from fxfuse.onnx.pieces import TypedTape, constant
from fxfuse.proof.positions.terms import Unreadable

_MASK = "attention_mask"
_HEADS = (0, 2, 1, 3)


def simplify_padding(model: ir.Model) -> None:
    """Rewrites a decoder with the inputs of `fxfuse.decoder.export`, in place."""
    for node in _looked_up(model.graph):
        _read_as_it_lies(model.graph, node)
    conditions: dict[ir.Value, ir.Value] = {}
    for node in [node for node in model.graph if node.op_type == "Where"]:
        _clear_in_place(model.graph, node, conditions)
    RemoveUnusedNodesPass()(model)


def _looked_up(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that look attention_mask up by indices and give all of it, as booleans [B, 1, 1, T]."""
    found = [node for node in graph if node.op_type == "GatherND" and node.outputs[0].dtype == ir.DataType.BOOL]
    try:
        masks = Masks(graph, padded=True)
    except Unreadable:
        return []
    return [node for node in found if masks.is_padding(node.outputs[0])]


def _read_as_it_lies(graph: ir.Graph, node: ir.Node) -> None:
    """Reads attention_mask by a cast in the place of such a node."""
    mask = next(value for value in graph.inputs if value.name == _MASK)
    old = node.outputs[0]
    tape = TypedTape()
    kept = tape.add("Cast", [mask], {"to": ir.DataType.BOOL}, dtype=ir.DataType.BOOL, shape=mask.shape)
    new = tape.add("Unsqueeze", [kept, constant(graph, [1, 2])], dtype=old.dtype, shape=old.shape)
    graph.insert_before(node, tape.nodes)
    old.replace_all_uses_with(new)


def _clear_in_place(graph: ir.Graph, node: ir.Node, conditions: dict[ir.Value, ir.Value]) -> None:
    """Makes a choice between 0 and an attention's result for whole positions [B, S, H·D], where the heads are taken
    apart for nothing else.

    Args:
        conditions: by condition [B, 1, S, 1], the same for positions, [B, S, 1]; layers share them.
    """
    result = node.outputs[0]
    condition, first, second = node.inputs
    if condition is None or first is None or second is None:
        return
    y = second if _sizes(first) == () else first
    together = _next(_next(node, "Transpose"), "Reshape")
    apart = _last(_last(y, "Transpose"), "Reshape")
    if together is None or apart is None or _sizes(y) != _sizes(result) or len(sizes := _sizes(condition) or ()) != 4:
        return
    before, after = apart.inputs[0], together.outputs[0]
    if before is None or _sizes(before) != _sizes(after) or len(_sizes(before) or ()) != 3 or sizes[1::2] != (1, 1):
        return
    if (_sizes(apart.outputs[0]) or ())[:2] != (_sizes(before) or ())[:2]:
        return
    tape = TypedTape()
    if condition not in conditions:
        conditions[condition] = tape.add("Squeeze", [condition, constant(graph, [1])], dtype=ir.DataType.BOOL)
    either = (before if value is y else value for value in (first, second))
    chosen = tape.add("Where", [conditions[condition], *either], dtype=after.dtype, shape=after.shape)
    graph.insert_before(node, tape.nodes)
    after.replace_all_uses_with(chosen)


def _sizes(value: ir.Value) -> tuple[int | str, ...] | None:
    """The dimensions of a value, if each is known by number or by name."""
    if value.shape is None:
        return None
    sizes = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
    return tuple(size for size in sizes if size is not None) if None not in sizes else None


def _next(node: ir.Node | None, kind: str) -> ir.Node | None:
    """The only node that reads the output of `node`, if it is of that kind; a Transpose has to swap positions and
    heads."""
    uses = [] if node is None else list(node.outputs[0].uses())
    return uses[0].node if len(uses) == 1 and _is(uses[0].node, kind) else None


def _last(of: ir.Value | ir.Node | None, kind: str) -> ir.Node | None:
    """The node that gives a value, or the first input of a node, on the same terms."""
    value = of.inputs[0] if isinstance(of, ir.Node) else of
    producer = None if value is None else value.producer()
    return producer if producer is not None and _is(producer, kind) else None


def _is(node: ir.Node, kind: str) -> bool:
    if node.op_type != kind or node.domain != "" or node.outputs[0].is_graph_output():
        return False
    return kind != "Transpose" or tuple(node.attributes.get_ints("perm", ())) == _HEADS
