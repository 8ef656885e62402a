"""A static cache in which each row of a batch has a length of its own, so that no padding is kept and no mask is
needed.

Row b writes the keys of its S new tokens at slot position_ids[b, 0], over whatever padding an earlier call left there.
Then position_ids[b, 0] + S slots of that row are filled; Attention is told so by `nonpad_kv_seqlen`, and is causal from
there back. The graph has no attention_mask any more. Rows are padded on the right: the next token of a row is given the
position, and so the slot, of its first padding.

    position_ids [B, S] ─ [:, 0] ─┬─ TensorScatter(write_indices)
                                  └─ + S ─ Attention(nonpad_kv_seqlen, is_causal=1)

This is right only where every layer sees all earlier tokens. Whether it does is read off the layers' masks, and decided
for every batch and length (`fxfuse.decoder.masks.decided`); anything else is refused.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fxfuse.decoder.forms.static import make_static
from fxfuse.decoder.masks.decided import Masks
from fxfuse.errors import FxfuseError
from fxfuse.onnx.pieces import TypedTape, constant
from fxfuse.proof.positions.terms import Unreadable


def make_ragged(model: ir.Model) -> None:
    """Rewrites a decoder with the inputs and outputs of `fxfuse.decoder.export`, in place.

    Raises:
        FxfuseError: the opset is below 24; something else is done with the cache than to join new keys to it; a layer
            does not see all earlier tokens; or the graph reads attention_mask for something else than masks. The model
            may be half rewritten then, and is of no use.
    """
    if (why := sees_otherwise(model.graph)) is not None:
        raise _refused(why)
    drop_padding(model.graph)
    make_static(model, "cuda")
    start, filled = _lengths(model.graph)
    for node in model.graph:
        if node.op_type == "TensorScatter":
            node.replace_input_with(2, start)
        elif node.op_type == "Attention" and len(node.inputs) > 6 and node.inputs[6] is not None:
            node.replace_input_with(3, None)
            node.replace_input_with(6, filled)
            node.attributes.add(ir.AttrInt64("is_causal", 1))
    RemoveUnusedNodesPass()(model)
    for value in [value for value in model.graph.inputs if value.name == "attention_mask"]:
        if value.uses():
            raise _refused(f"{next(iter(value.uses())).node.op_type} reads attention_mask beside the attention")
        model.graph.inputs.remove(value)


def sees_otherwise(graph: ir.Graph) -> str | None:
    """Why the graph is not plainly causal: the first attention with a past whose mask shows a query anything but the
    tokens up to its own, and where. None if every such attention is causal."""
    names = {node.inputs[3]: node.name for node in graph if has_past(node)}
    try:
        masks = Masks(graph, padded=False)
    except Unreadable as error:
        return f"its masks cannot be read: {error}"
    for mask, name in names.items():
        if mask is None:
            why: str | None = "it has no mask at all"
        elif not of_masks(mask):
            why = "its mask is made of more than attention_mask and lengths"
        else:
            why = masks.otherwise_than_causal(mask)
        if why is not None:
            return f"the attention {name} does not see just the tokens before: {why}"
    return None


def drop_padding(graph: ir.Graph) -> None:
    """Takes out the choices that transformers makes, beside the attention, for rows of padding that see no key: without
    padding each of them always goes the same way."""
    masks = Masks(graph, padded=False)
    known: dict[ir.Value, bool | None] = {}
    for node in [node for node in graph if node.op_type == "Where" and of_masks(node.inputs[0])]:
        condition = node.inputs[0]
        assert condition is not None
        if condition not in known:
            known[condition] = masks.constant(condition)
        if (always := known[condition]) is not None:
            _choose(graph, node, node.inputs[1 if always else 2])


def _choose(graph: ir.Graph, node: ir.Node, taken: ir.Value | None) -> None:
    """Replaces a Where by the branch that it always takes, unless the Where also broadcasts that to more dimensions."""
    result = node.outputs[0]
    ranks = [None if v is None or v.shape is None else len(v.shape) for v in (taken, result)]
    if taken is None or (None not in ranks and ranks[0] != ranks[1]):
        return
    result.replace_all_uses_with(taken, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def of_masks(value: ir.Value | None) -> bool:
    """Is a value computed from attention_mask, and besides from nothing but position_ids, constants and sizes?"""
    seen: set[ir.Value] = set()
    stack = [value] if value is not None else []
    names = set()
    while stack:
        here = stack.pop()
        producer = here.producer()
        if producer is None:
            names.update([here.name] if here.is_graph_input() else [])
        elif producer.op_type != "Shape":
            new = [i for i in producer.inputs if i is not None and i not in seen]
            seen.update(new)
            stack.extend(new)
    return "attention_mask" in names and names <= {"attention_mask", "position_ids"}


def _lengths(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """The slot at which each row writes, and how many of its slots are filled after that: both int64 [B]."""
    inputs = {value.name: value for value in graph.inputs}
    for name in ("input_ids", "position_ids"):
        if name not in inputs:
            raise _refused(f"the graph has no {name}, which says where each row stands")
    tape, zero, one = TypedTape(), constant(graph, [0]), constant(graph, [1])
    first = tape.add("Slice", [inputs["position_ids"], zero, one, one])
    start = tape.add("Reshape", [first, constant(graph, [-1])])
    filled = tape.add("Add", [start, tape.add("Shape", [inputs["input_ids"]], {"start": 1, "end": 2})])
    graph.insert_before(next(iter(graph)), tape.nodes)
    return start, filled


def has_past(node: ir.Node) -> bool:
    """Is it an Attention that is given a past?"""
    return node.op_type == "Attention" and len(node.inputs) > 4 and node.inputs[4] is not None


def _refused(why: str) -> FxfuseError:
    return FxfuseError(f"rows cannot stand at lengths of their own: {why}", where="ragged", hint="ragged=False")
