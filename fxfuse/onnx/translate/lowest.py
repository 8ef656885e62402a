"""Masks that hide keys with the lowest number of their type, rewritten so that ONNX Runtime treats them as PyTorch
does.

In PyTorch a query whose mask is `finfo.min` at every key averages over the keys: the scores are lost when that number
is added to them, so softmax sees one number everywhere. transformers' eager masks have such rows for padding. ONNX
defines Attention in the same way; it gives 0 only where the whole mask is -inf. But ONNX Runtime (1.32, CPU) gives 0 if
no key that `is_causal` and `nonpad_kv_seqlen` let through has a mask above the lowest number. Its kernel takes that
number as the mark of a hidden key (`mask_filter_value` in onnxruntime/core/providers/cpu/llm/attention.h), and gives 0
for rows of such marks since https://github.com/microsoft/onnxruntime/pull/28958. From the next number on it averages.

So the lowest number becomes the next one above it, which hides a key as well. -inf and all other numbers stay. (A row
in which nothing is above these two neighbours would now average over both; no model is known that tells them apart.)

    a constant of which only masks are made     is written anew; no node is added
    a mask that may hold the lowest number      Where(Equal(mask, lowest), next, mask), once for all who read it
    all else                                    stays: booleans, constant biases, types whose kernels know no such mark

Superfluous once ONNX Runtime looks for -inf.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir

from fxfuse.onnx.pieces import TypedTape, initializer
from fxfuse.onnx.translate.intervals import MOVES, Numbers, Use, constant_at, holds, places

LOWEST = np.finfo(np.float32).min
NEXT = np.nextafter(LOWEST, np.float32(0))
HALF_LOWEST = np.finfo(np.float16).min
HALF_NEXT = np.nextafter(HALF_LOWEST, np.float16(0))
ABOVE: dict[Any, tuple[Any, Any]] = {
    np.dtype(np.float32): (LOWEST, NEXT),
    np.dtype(np.float16): (HALF_LOWEST, HALF_NEXT),
}
"""For each type its lowest number, and the next one above it."""
TYPES = {ir.DataType.FLOAT: np.dtype(np.float32), ir.DataType.FLOAT16: np.dtype(np.float16)}
MASK = 3
"""Which of Attention's inputs the mask is."""


def without_lowest(model: ir.Model) -> int:
    """Rewrite, in place, the masks of the model's Attentions that may hold the lowest number of their type.

    Returns:
        How many were rewritten.
    """
    numbers, raised = Numbers(), Numbers(_without_lowest, _makes_masks)
    found: dict[ir.Value, list[Use]] = {}
    for node in model.graph.all_nodes():
        mask = node.inputs[MASK] if _is_attention(node) and len(node.inputs) > MASK else None
        if mask is not None and mask.dtype in TYPES and holds(numbers.at((node, MASK)), _lowest(mask)):
            found.setdefault(mask, []).append((node, MASK))
    change, count = _Change(model.graph), 0
    for mask, uses in found.items():
        if holds(raised.at(uses[0]), _lowest(mask)):
            count += change.choose(uses)
        else:
            for use in uses:
                change.raise_constants(use)
            count += 1
    change.tidy()
    return count


class _Change:
    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.raised: dict[ir.Value, ir.Value] = {}
        """Constants without the lowest number, by the constant with it."""
        self.chosen: dict[ir.Value, ir.Value] = {}
        """Masks without the lowest number, by the mask with it."""

    def raise_constants(self, use: Use) -> None:
        """Gives what is read there other constants to be made of."""
        node, place = use
        value = node.inputs[place]
        assert value is not None
        array = constant_at(use)
        if array is not None:
            if not _has_lowest(array) or not _makes_masks(node):
                return
            if value not in self.raised:
                names = (f"fxfuse.above_lowest_{i}" for i in itertools.count())
                name = next(name for name in names if name not in self.graph.initializers)
                self.raised[value] = initializer(self.graph, name, ir.tensor(_without_lowest(array)))
            node.replace_input_with(place, self.raised[value])
        elif (producer := value.producer()) is not None:
            for operand in places(producer):
                if producer.inputs[operand] is not None:
                    self.raise_constants((producer, operand))

    def tidy(self) -> None:
        """Leaves no constant behind that nobody reads any more."""
        for constant in self.raised:
            node = constant.producer()
            if constant.uses() or constant.is_graph_output():
                continue
            if node is not None and node.graph is not None:
                node.graph.remove(node)
            elif constant.name is not None and constant.name in self.graph.initializers:
                del self.graph.initializers[constant.name]

    def choose(self, uses: list[Use]) -> bool:
        """Insert the choice before these readers of a mask, or before nodes that only move its elements for masks.

        The mask is smaller there, and layers that expand or slice the same tensor share the nodes. Gives whether that
        was to be done still.
        """
        mask = uses[0][0].inputs[uses[0][1]]
        assert mask is not None
        node = mask.producer()
        while node is not None and node.op_type in MOVES and node.domain == "" and _makes_masks(node):
            uses, mask = [(node, 0)], node.inputs[0]
            assert mask is not None
            node = mask.producer()
        if _is_choice(mask):
            return False
        if mask not in self.chosen:
            self.chosen[mask] = self._choice(mask)
        for reader, place in uses:
            reader.replace_input_with(place, self.chosen[mask])
        return True

    def _choice(self, mask: ir.Value) -> ir.Value:
        assert mask.dtype is not None
        suffix = "" if mask.dtype == ir.DataType.FLOAT else "_half"
        number, following = ABOVE[TYPES[mask.dtype]]
        lowest = initializer(self.graph, f"fxfuse.lowest{suffix}", ir.tensor(np.array(number)))
        above = initializer(self.graph, f"fxfuse.above_lowest{suffix}", ir.tensor(np.array(following)))
        tape = TypedTape()
        equal = tape.add("Equal", [mask, lowest], dtype=ir.DataType.BOOL, shape=mask.shape)
        choice = tape.add("Where", [equal, above, mask], dtype=mask.dtype, shape=mask.shape)
        producer = mask.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], tape.nodes)
        else:
            assert producer.graph is not None
            producer.graph.insert_after(producer, tape.nodes)
        return choice


def _is_choice(mask: ir.Value) -> bool:
    """Was this mask made by `_choice`, in this run or an earlier one?"""
    node = mask.producer()
    condition = None if node is None or node.op_type != "Where" or node.inputs[0] is None else node.inputs[0].producer()
    if node is None or condition is None or condition.op_type != "Equal" or condition.inputs[0] is not node.inputs[2]:
        return False
    lowest, above = constant_at((condition, 1)), constant_at((node, 1))
    if lowest is None or above is None or lowest.dtype not in ABOVE:
        return False
    number, following = ABOVE[lowest.dtype]
    return bool((lowest == number).all() and (above == following).all())


def _lowest(mask: ir.Value) -> float:
    assert mask.dtype is not None
    return float(ABOVE[TYPES[mask.dtype]][0])


def _has_lowest(array: np.ndarray) -> bool:
    return array.dtype in ABOVE and bool((array == ABOVE[array.dtype][0]).any())


def _without_lowest(array: np.ndarray) -> np.ndarray:
    if not _has_lowest(array):
        return array
    lowest, following = ABOVE[array.dtype]
    return np.where(array == lowest, following, array)


def _makes_masks(node: ir.Node) -> bool:
    """Are the node's outputs used for nothing but masks of Attentions, through operators that keep a number's
    meaning?"""
    if _is_attention(node):
        return True
    return not any(output.is_graph_output() for output in node.outputs) and all(
        place == MASK if _is_attention(reader) else place in places(reader) and _makes_masks(reader)
        for output in node.outputs
        for reader, place in output.uses()
    )


def _is_attention(node: ir.Node) -> bool:
    return node.op_type == "Attention" and node.domain == ""
