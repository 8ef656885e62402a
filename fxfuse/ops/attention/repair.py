"""Attention whose keys and values were repeated for every query head.

A model with fewer key heads than query heads (GQA) repeats them before `scaled_dot_product_attention`, and exporters
write that down: [B, Hkv, S, D] → [B, Hkv, 1, S, D] → [B, Hkv, G, S, D] → [B, Hkv·G, S, D]. ONNX's Attention shares
heads by itself. The four values are told apart by their shapes alone. It does not matter which operators make them,
because whatever inserts a dimension of 1, broadcasts it and merges it keeps the order of the elements.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase

MERGES = ("Reshape",)
BROADCASTS = ("Expand", "Tile")
INSERTS = ("Unsqueeze", "Reshape")


class RepeatedHeads(RewriteRuleClassBase):
    """Attention reads the keys and values as they were before they were repeated."""

    what = "Attention: keys and values no longer repeated for every query head"

    def pattern(self, op: Any, q: Any, k: Any, v: Any) -> Any:
        return op.Attention(q, k, v, _allow_other_inputs=True, _outputs=["y"])

    def check(self, context: Any, k: ir.Value, v: ir.Value, **_: Any) -> MatchResult:  # type: ignore[override]
        result = MatchResult()
        key, value = unrepeated(k), unrepeated(v)
        if any(past is not None for past in context.root.inputs[4:6]):
            return result.fail("the cache has as many heads as the queries")
        if key is None or value is None or _heads(key) != _heads(value):
            return result.fail("keys and values are not both known to be repeated")
        return result

    def rewrite(self, op: Any, q: ir.Value, k: ir.Value, v: ir.Value, y: ir.Value) -> ir.Value:
        node = y.producer()
        key, value = unrepeated(k), unrepeated(v)
        assert node is not None and key is not None
        attributes: dict[str, Any] = dict(node.attributes)
        if "kv_num_heads" in attributes:
            attributes["kv_num_heads"] = _heads(key)
        result: ir.Value = op.Attention(q, key, value, *node.inputs[3:], **attributes)
        return result


def unrepeated(repeated: ir.Value) -> ir.Value | None:
    """The [B, Hkv, S, D] of which `repeated` is a copy for every query head, or None."""
    merged = _sizes(repeated, 4)
    direct = _source(repeated, BROADCASTS)
    if merged and direct is not None and (one := _sizes(direct, 4)) and one == [merged[0], 1, *merged[2:]]:
        return direct  # one key head that was broadcast to all query heads
    wide = _source(repeated, MERGES)
    narrow = None if wide is None else _source(wide, BROADCASTS)
    source = None if narrow is None else _source(narrow, INSERTS)
    if not merged or wide is None or narrow is None or source is None:
        return None
    sizes, spread, single = _sizes(source, 4), _sizes(wide, 5), _sizes(narrow, 5)
    if not sizes or not spread or not single:
        return None
    batch, heads, length, size = sizes
    group = spread[2]
    if not isinstance(heads, int) or not isinstance(group, int) or group < 2:
        return None
    steps = (
        single == [batch, heads, 1, length, size],
        spread == [batch, heads, group, length, size],
        merged == [batch, heads * group, length, size],
    )
    return source if all(steps) else None


def _source(value: ir.Value, operators: tuple[str, ...]) -> ir.Value | None:
    """The first input of the node that made `value`, if that is one of these operators."""
    node = value.producer()
    return node.inputs[0] if node is not None and node.domain == "" and node.op_type in operators else None


def _sizes(value: ir.Value, rank: int) -> list[int | str] | None:
    """Every size as a number or as its symbol; None where one is not known."""
    if value.shape is None or len(value.shape) != rank:
        return None
    sizes = [size if isinstance(size, int) else size.value for size in value.shape]
    known = [size for size in sizes if size is not None]
    return known if len(known) == rank else None


def _heads(value: ir.Value) -> int | str:
    sizes = _sizes(value, 4)
    assert sizes is not None
    return sizes[1]


RULES = (RepeatedHeads,)
