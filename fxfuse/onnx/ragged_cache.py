"""A static cache in which each row of a batch stands at a length of its own: no padding is kept, no mask is needed.

Row b writes its S new tokens at position_ids[b, 0], over whatever padding an earlier call left there, and sees what is
filled after that, position_ids[b, 0] + S slots: `nonpad_kv_seqlen` of Attention, causal from there. There is no
attention_mask any more: padding stands on the right of a row, and the row's next token has the position of the first.

    position_ids [B, S] ─ [:, 0] ─┬─ TensorScatter(write_indices)
                                  └─ + S ─ Attention(nonpad_kv_seqlen, is_causal=1)

Right only for layers that see every earlier token. Whether they do is told by their masks, evaluated (in ONNX's
reference implementation) at sizes beyond every number in what computes them, so that a window shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fxfuse.errors import FxfuseError
from fxfuse.onnx.pieces import constant, takes_one_token
from fxfuse.onnx.static_cache import make_static

LONGEST = 1 << 18
"""Keys that a mask is evaluated at, at most."""
_SENTINEL = 1 << 40
"""From here on a number means "all", or is the lowest of a type."""
_NEVER = -1e4
"""A score with this added has no weight in any type."""
Sample = Callable[[ir.Value, int, int, int], np.ndarray]


def make_ragged(model: ir.Model) -> None:
    """Rewrites a decoder with the inputs and outputs of `fxfuse.onnx.decoder`, in place.

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
    masks = {node.inputs[3]: node.name for node in graph if has_past(node)}
    for mask, name in masks.items():
        why = "it has no mask at all" if mask is None else _not_causal(graph, mask)
        if why is not None:
            return f"the attention {name} does not see just the tokens before: {why}"
    return None


def _not_causal(graph: ir.Graph, mask: ir.Value) -> str | None:
    """How this mask [.., S, P + S] differs, with no padding, from hiding what comes after each token; None: not."""
    if not of_masks(mask):
        return "its mask is made of more than attention_mask and lengths"
    for found, new, past in _without_padding(graph, mask):
        seen = found if found.dtype == bool else found > _NEVER
        expected = np.tril(np.ones((new, past + new), bool), past)
        if found.dtype != bool and np.any(found[seen] != 0):
            return "a bias is added to its scores"
        if seen.shape[-2:] != expected.shape or not np.all(seen == expected):
            return f"at {past} tokens and {new} more other keys are hidden (a window?)"
    return None


def drop_padding(graph: ir.Graph) -> None:
    """Takes out what only padding needs beside the masks of the attention."""
    for node in [node for node in graph if node.op_type == "Where" and of_masks(node.inputs[0])]:
        _choose(graph, node)


def _choose(graph: ir.Graph, node: ir.Node) -> None:
    """Takes out a choice that only padding makes: what becomes of a token that sees nothing."""
    condition, chosen, otherwise = node.inputs
    assert condition is not None and chosen is not None and otherwise is not None
    values = [found for found, _, _ in _without_padding(graph, condition)]
    taken = chosen if all(found.all() for found in values) else otherwise
    if taken is otherwise and any(found.any() for found in values):
        return
    node.outputs[0].replace_all_uses_with(taken, replace_graph_outputs=True)
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


def _without_padding(graph: ir.Graph, value: ir.Value) -> Iterator[tuple[np.ndarray, int, int]]:
    """The value for S new tokens after P, with S and P: from the start, soon after, and far on.

    S is 1 where the graph takes no more.
    """
    for found, fed in evaluated(graph, value, unpadded):
        new, total = fed["input_ids"].shape[1], fed["attention_mask"].shape[1]
        yield found, new, total - new


def evaluated(graph: ir.Graph, value: ir.Value, sample: Sample) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The value for batches of B rows and S new tokens after P, sizes beyond every number that it is made with; and
    what the graph was fed then: of each input ``sample(input, B, S, P)``."""
    from onnx.reference import ReferenceEvaluator

    given = [v for v in graph.inputs if v.name is not None]
    part = ir.convenience.extract(graph, given, [value])
    part.outputs[0].shape = None
    largest = max(_numbers(part), default=0)
    if largest > LONGEST:
        raise _refused(f"a mask mentions {largest}, and more than {LONGEST} keys are not looked at")
    run = ReferenceEvaluator(ir.to_proto(ir.Model(part, ir_version=10)))
    one_token = takes_one_token(graph)
    for batch, several, past in ((2, 5, 0), (2, 3, 4), (1, 2, 2 * largest + 3)):
        new = 1 if one_token else several
        feeds = {v.name or "": sample(v, batch, new, past) for v in given}
        results: Any = run.run(None, feeds)
        yield np.asarray(results[0]), feeds


def unpadded(value: ir.Value, batch: int, new: int, past: int) -> np.ndarray:
    """An input of the decoder for a batch without padding."""
    if value.name == "position_ids":
        return np.tile(np.arange(past, past + new), (batch, 1))
    sizes = {"batch_size": batch, "sequence_length": new, "past_sequence_length": past}
    sizes["total_sequence_length"] = past + new
    assert value.shape is not None and value.dtype is not None
    names = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    for dim in names:
        if isinstance(dim, str) and dim not in sizes:
            raise _refused(f"{value.name} has a size {dim} that is none of a decoder's")
    shape = [dim if isinstance(dim, int) else sizes[dim] for dim in names]
    return np.ones(shape, value.dtype.numpy())


def _numbers(graph: ir.Graph) -> Iterable[int]:
    """The whole numbers that the graph mentions."""
    constants = [value.const_value for value in graph.initializers.values()]
    constants += [a.as_tensor() for n in graph.all_nodes() for a in n.attributes.values() if a.name == "value"]
    for tensor in constants:
        if tensor is not None and tensor.size <= 64 and tensor.dtype != ir.DataType.STRING:
            flat = np.abs(tensor.numpy().astype(np.float64).ravel())
            yield from (int(n) for n in flat[np.isfinite(flat)] if n < _SENTINEL)
    for attribute in (a for n in graph.all_nodes() for a in n.attributes.values()):
        if attribute.name == "value_int":
            yield abs(attribute.as_int())
        elif attribute.name == "value_ints":
            yield from map(abs, attribute.as_ints())


def _lengths(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """Where each row writes, and how much of it is filled then: both int64 [B]."""
    inputs = {value.name: value for value in graph.inputs}
    for name in ("input_ids", "position_ids"):
        if name not in inputs:
            raise _refused(f"the graph has no {name}, which says where each row stands")
    slice_of = [constant(graph, [number]) for number in (0, 1, 1)]
    first = ir.node("Slice", [inputs["position_ids"], *slice_of])
    start = ir.node("Reshape", [first.outputs[0], constant(graph, [-1])])
    new = ir.node("Shape", [inputs["input_ids"]], {"start": 1, "end": 2})
    filled = ir.node("Add", [start.outputs[0], new.outputs[0]])
    for node in (first, start, new, filled):
        node.outputs[0].dtype = ir.DataType.INT64
    graph.insert_before(next(iter(graph)), [first, start, new, filled])
    return start.outputs[0], filled.outputs[0]


def has_past(node: ir.Node) -> bool:
    """Is it an Attention that is given a past?"""
    return node.op_type == "Attention" and len(node.inputs) > 4 and node.inputs[4] is not None


def _refused(why: str) -> FxfuseError:
    return FxfuseError(f"rows cannot stand at lengths of their own: {why}", where="ragged", hint="ragged=False")
