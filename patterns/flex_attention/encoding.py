"""How a score that was read is said with one Attention: attributes first, then q or k, then a mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxfuse.patterns.flex_attention.causal import without_causal, without_windows
from fxfuse.patterns.flex_attention.expression import INDICES, Expr, call, leaf
from fxfuse.patterns.flex_attention.options import Windows
from fxfuse.patterns.flex_attention.score import Factor, Opaque, Score


@dataclass(frozen=True)
class Encoding:
    """Attention(q · on_query, k · on_key, v, mask) with these attributes."""

    scale: float
    softcap: float
    causal: bool
    on_query: tuple[Factor, ...]
    on_key: tuple[Factor, ...]
    number: float
    """What q is multiplied with beside: a scale that is no positive number."""
    keep: tuple[Expr, ...]
    """Conditions that must all hold, but for causality; a boolean mask where there is no bias."""
    bias: Expr | None
    """What is added to the scores, -inf where a key is not kept."""
    window: tuple[int, int] = (-1, -1)
    """How far behind a query a key may be, and how far ahead; -1 is any."""

    @property
    def wide(self) -> bool:
        """In half precision flex_attention scales, caps and adds in float32: so must this.

        A mask alone leaves the scores as q·kᵀ gives them, which kernels of every type add up in float32.
        """
        scaled = bool(self.on_query or self.on_key) or self.number != 1
        return scaled or self.softcap != 0 or self.bias is not None

    @property
    def with_mask(self) -> Encoding:
        """The same, causality in the mask: for what has more keys than the call."""
        if not self.causal:
            return self
        seen = call(torch.ops.aten.ge.Tensor, leaf("q", torch.int64), leaf("kv", torch.int64), dtype=torch.bool)
        return replace(self, causal=False, keep=(seen, *self.keep))

    @property
    def parts(self) -> dict[str, Any]:
        """What it uses, for the report."""
        found: dict[str, Any] = {"scale": self.scale, "is_causal": int(self.causal), "softcap": self.softcap}
        if self.window != (-1, -1):
            found |= {"left_window_size": self.window[0], "right_window_size": self.window[1]}
        if self.on_query or self.number != 1:
            found["folded into Q"] = _over(self.on_query)
        if self.on_key:
            found["folded into K"] = _over(self.on_key)
        if self.bias is not None:
            found["additive mask"] = _over((self.bias, *self.keep))
        elif self.keep:
            found["boolean mask"] = _over(self.keep)
        return found


def encode(score: Score, mask: Sequence[Expr], scale: float, windows: Windows = "mask") -> Encoding | Opaque:
    """The encoding of where(mask, score, -inf) at this scale of q·kᵀ; or why there is none."""
    on_query: list[Factor] = []
    on_key: list[Factor] = []
    for factor in _separated(score.factors):
        over = factor.value.leaves & {"q", "kv"}
        if len(over) == 2:
            return Opaque("the score times a factor that varies with query and key, and is no product of the two")
        (on_key if "kv" in over else on_query).append(factor)
    number, softcap = score.number, 0.0
    if score.cap is not None:
        softcap, number = score.cap, number * score.cap
    if abs(number - round(number)) < 1e-12:
        number = float(round(number))
    positive = number > 0
    causal, keep = without_causal((*score.keep, *mask))
    left, right = -1, -1
    if windows == "attributes":
        left, right, keep = without_windows(keep)
    bias = score.bias
    if bias is not None and _constant_over_keys(bias):
        bias = None
    return Encoding(
        scale * number if positive else scale,
        softcap,
        causal,
        tuple(on_query),
        tuple(on_key),
        1.0 if positive else number,
        keep,
        bias,
        (left, right),
    )


def _separated(factors: Sequence[Factor]) -> list[Factor]:
    """Products written out, so that each factor goes where it belongs."""
    found: list[Factor] = []
    for factor in factors:
        value = factor.value
        product = value.name in ("mul", "div") and not value.kwargs and len(value.leaves & {"q", "kv"}) == 2
        floating = value.dtype is not None and value.dtype.is_floating_point
        if product and floating and all(isinstance(a, Expr) for a in value.args):
            first, second = value.args
            divided = value.name == "div"
            found += _separated([Factor(first, factor.inverse), Factor(second, factor.inverse != divided)])
        else:
            found.append(factor)
    return found


def _constant_over_keys(bias: Expr) -> bool:
    """Shifts every score of a row by one finite number, which a softmax does not see."""
    if bias.number is not None:
        return math.isfinite(bias.number)
    whole = bias.dtype in (torch.int32, torch.int64)
    return whole and bias.leaves <= frozenset(INDICES) - {"kv"}


def _over(values: Sequence[Expr | Factor]) -> str:
    """``"[B, 1, S, T]"``: which of the sizes these vary over."""
    leaves: frozenset[str] = frozenset().union(*((v.value if isinstance(v, Factor) else v).leaves for v in values))
    sizes = zip(INDICES, ("B", "H", "S", "T"), strict=True)
    return "[" + ", ".join(size if name in leaves else "1" for name, size in sizes) + "]"
