"""StreamingLLM: a decoder that reads without end, and keeps only the first few tokens (the sinks) and the last W.

    past_key_values.N.key   [B, H, P, D]       becomes    [B, H, C, D], C = sinks + W; keys are not rotated
    present.N.key           [B, H, P + S, D]              the same after the new tokens: input and output may share it

Position p < sinks stands in slot p, p >= sinks in slot sinks + (p - sinks) mod W. A token sees the sinks and the last W
tokens, itself included. Keys are cached before they are rotated, and rotated by their *place*, which is their rank
among what the token sees. So no place is beyond C - 1, however much was read. This is right only if a rotation tells
nothing but distances, which is checked first (`rotation`).

position_ids [B, S], consecutive in each row, say how much was read before; rows may stand at different lengths, and
there is no attention_mask. There is no padding either: every row takes S tokens. A graph for any S (`any_tokens`) and
one for a single token (`one_token`) have the same cache, and take turns on it.

Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks, https://arxiv.org/abs/2309.17453, 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fxfuse.decoder.description import describe
from fxfuse.decoder.forms.ragged import drop_padding, has_past, sees_otherwise
from fxfuse.decoder.forms.static import check_opset
from fxfuse.decoder.forms.streaming.any_tokens import AnyTokensCache
from fxfuse.decoder.forms.streaming.layer import StreamingCache, refused, rewrite
from fxfuse.decoder.forms.streaming.one_token import OneTokenCache
from fxfuse.decoder.names import pasts_of
from fxfuse.onnx.pieces import takes_one_token


def make_streaming(model: ir.Model, sinks: int, window: int) -> None:
    """Rewrites a decoder with the inputs and outputs of `fxfuse.decoder.export`, in place.

    Args:
        sinks: how many of the first tokens are kept, 0 or more.
        window: how many of the last are, 1 or more.

    Raises:
        FxfuseError: the graph is for one token and its opset is below 24, which brought TensorScatter; a layer's keys
            do not come from a RotaryEmbedding, or from one that tells more than distances; a layer does not see all
            earlier tokens (it has a window of its own); or the graph reads attention_mask or the cache for something
            else than attention. The model may be half rewritten then, and is of no use.
    """
    graph = model.graph
    if one_token := takes_one_token(graph):
        check_opset(model)
    pasts = pasts_of(model)
    attentions = [node for node in graph if has_past(node)]
    if (why := sees_otherwise(graph)) is not None:
        raise refused(why)
    drop_padding(graph)
    cache: StreamingCache = (OneTokenCache if one_token else AnyTokensCache)(graph, sinks, window)
    for node in attentions:
        rewrite(node, cache)
    RemoveUnusedNodesPass()(model)
    _check_uses(graph, cache.readers, [past for _, past in pasts])
    describe(model, "streaming", sinks=sinks, window=window)


def _check_uses(graph: ir.Graph, readers: Mapping[ir.Value, ir.Node | None], pasts: Sequence[ir.Value]) -> None:
    """Raises FxfuseError where something still reads the cache beside the attention, or attention_mask; takes the mask
    out of the graph's inputs otherwise."""
    for past in pasts:
        if past not in readers:
            raise refused(f"no Attention reads {past.name}")
        for use in past.uses():
            if use.node is not readers[past] and not _is_batch_size(use.node):
                raise refused(f"{use.node.op_type} reads {past.name} beside the attention")
    for value in [value for value in graph.inputs if value.name == "attention_mask"]:
        if value.uses():
            raise refused(f"{next(iter(value.uses())).node.op_type} reads attention_mask beside the attention")
        graph.inputs.remove(value)


def _is_batch_size(node: ir.Node) -> bool:
    attributes = node.attributes
    return node.op_type == "Shape" and attributes.get_int("start", 0) == 0 and attributes.get_int("end", 4) in (1, -3)
