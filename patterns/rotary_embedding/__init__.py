"""Rotary position embedding: pairs of features rotated by an angle that depends on the position.

Source: https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html; Su et al., https://arxiv.org/abs/2104.09864.

    y_a = cos·x_a − sin·x_b        halves:      (a, b) = (i, i + r/2)
    y_b = sin·x_a + cos·x_b        interleaved: (a, b) = (2i, 2i + 1)       for i < r/2; features from r on pass

A region f from x to y of the same shape is run, and asked whether it is linear, whether f(0) = 0, and whether each
feature reaches only its own position. Then a one-hot x gives, for each position, a matrix: which entries are not 0
tells which features are paired, and the entries are cos and sin. All other inputs hold values that occur once, so that
an entry also tells which element of which tensor it is.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from fxfuse.graph.region import Region, between
from fxfuse.graph.view import (
    ARITHMETIC,
    CAST,
    LAYOUT,
    SCATTERS,
    UNSET,
    GraphView,
    fake,
    is_float,
    op_name,
    static,
)
from fxfuse.patterns.rotary_embedding.forms import rotary_forms
from fxfuse.patterns.rotary_embedding.rotation import Rotation, measure_rotation
from fxfuse.patterns.rotary_embedding.tables import read_caches
from fxfuse.recognise.answers import Found, Input, Proposal, Reason
from fxfuse.recognise.probe import Probe
from fxfuse.recognise.walk import backward, forward

_PRODUCTS = frozenset({"mul", "addcmul", "einsum", "matmul", "bmm"})
_MATRIX = frozenset({"matmul", "bmm", "einsum"})
_SUMS = frozenset({"add", "sub", "addcmul", "rsub", "sum"})


def _walked(name: str) -> bool:
    return name in ARITHMETIC or name in CAST or name in LAYOUT or name in ("sum", "einsum", "where", "matmul")


class RotaryEmbedding:
    """Rotary position embedding in every spelling: halves or interleaved, whole or partial, real or complex."""

    name = "rotary_embedding"
    operator = "RotaryEmbedding"
    since_opset = 23

    def propose(self, view: GraphView, ask: Probe) -> Iterator[Proposal]:
        for node in view.nodes:
            if _mixes(view, node):
                outputs = forward(view, node, _walked, depth=7, limit=24)
                # A concatenation further on may add the features that pass.
                wider = any(op_name(n) in ("cat", "concat") for n in outputs)
                yield Proposal(node, self._around(view, node, outputs), best_rank=int(wider))

    def _around(self, view: GraphView, anchor: Node, outputs: list[Node]) -> Iterator[Region]:
        """Regions around a sum of products: each output behind it, nearest first, with each input of its shape before
        it."""
        sources = backward(view, anchor, _walked, depth=10, limit=40)
        for output in outputs:
            if not is_float(output) or fake(output).dim() < 2:
                continue
            tried = 0
            for source in sources:
                if not is_float(source) or not view.same_shape(source, output) or op_name(source) in UNSET:
                    continue
                region = between(view, output, [source], _walked, limit=48)
                if region is not None and anchor in region.nodes and _multiplies(region):
                    tried += op_name(source) not in SCATTERS  # a scatter holds but a part of the result
                    yield region
                if tried == 4:
                    break

    def recognise(self, region: Region, ask: Probe) -> Found | Reason:
        (x,) = region.sources
        if static(fake(x).shape[-1]) is None:
            return Reason("the rotated axis has no fixed size")
        rotation = measure_rotation(region, ask)
        if isinstance(rotation, Reason):
            return rotation
        found = read_caches(rotation.rows, rotation.inputs)
        if isinstance(found, Reason):
            return found
        caches = found[0]
        parameters = {
            "interleaved": int(rotation.interleaved),
            "rotary_embedding_dim": rotation.rotary_dim if rotation.rotary_dim < rotation.dim else 0,
            "cos": Input(1 + caches.cos.index),
            "sin": Input(1 + caches.sin.index),
        }
        return Found(
            self.operator,
            parameters,
            rotary_forms(region, rotation, found),
            rank=_rank(region, rotation),
            from_leaves=rotation.from_leaves,
            claims=(rotation.claim,) if rotation.claim else (),
        )


def _rank(region: Region, rotation: Rotation) -> int:
    """Prefer the region of the whole head to that of its rotated part: the slice and the concatenation go with it."""
    return 1 if rotation.rotary_dim < rotation.dim else 0


def _mixes(view: GraphView, node: Node) -> bool:
    """May this node mix pairs of features: is it a sum of products, a complex product, a product with 2 by 2
    matrices?"""
    if op_name(node) in _MATRIX:
        shapes = (tuple(fake(i).shape[-2:]) for i in node.all_input_nodes if is_float(i))
        return any(all(static(d) == 2 for d in shape) and len(shape) == 2 for shape in shapes)
    if op_name(node) in _SUMS:
        near = [node, *backward(view, node, _walked, depth=4, limit=16)]
        return is_float(node) and fake(node).dim() >= 2 and any(op_name(n) in _PRODUCTS for n in near)
    return op_name(node) == "mul" and fake(node).dtype.is_complex


def _multiplies(region: Region) -> bool:
    return any(op_name(n) in _PRODUCTS for n in region.nodes) and bool(region.others)


PATTERN = RotaryEmbedding()
