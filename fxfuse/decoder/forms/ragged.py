"""A static cache in which each row of a batch stands at a length of its own: no padding is kept, no mask is needed.

Row b writes its S new tokens at position_ids[b, 0], over whatever padding an earlier call left there, and sees what is
filled after that, position_ids[b, 0] + S slots: `nonpad_kv_seqlen` of Attention, causal from there. There is no
attention_mask any more: padding stands on the right of a row, and the row's next token has the position of the first.

    position_ids [B, S] ─ [:, 0] ─┬─ TensorScatter(write_indices)
                                  └─ + S ─ Attention(nonpad_kv_seqlen, is_causal=1)

Right only for layers that see every earlier token. Whether they do is told by their masks, which are read and decided
for every length (`fxfuse.decoder.masks.decided`).
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
        FxfuseError: below opset 24, a cache that is not only joined with new keys, a layer that does not see all
            earlier tokens, or a graph that reads attention_mask for something else. The model is of no use then.
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
    """Which attention with a past does not see all tokens before each, and no others; None: all do."""
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
    """Takes out what only padding needs beside the masks of the attention, for a token that sees nothing."""
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
    """Takes out a choice that is always the same, if what is taken is as large as the result."""
    result = node.outputs[0]
    ranks = [None if v is None or v.shape is None else len(v.shape) for v in (taken, result)]
    if taken is None or (None not in ranks and ranks[0] != ranks[1]):
        return
    result.replace_all_uses_with(taken, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def of_masks(value: ir.Value | None) -> bool:
    """Is it made of attention_mask, of positions and of lengths alone?"""
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
    """Where each row writes, and how much of it is filled then: both int64 [B]."""
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
