"""Factors of the scores as factors of q and k: one of a head or a query is q's, one of a key is k's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxfuse.graph.region import Region
from fxfuse.patterns.attention.factors import Factor
from fxfuse.patterns.attention.heads import Heads
from fxfuse.patterns.attention.layouts import Atoms, Axes, aligned
from fxfuse.patterns.attention.rearrange import rearranged
from fxfuse.proof.evaluate import Evaluator
from fxfuse.recognise.answers import Reason


def not_expressible(region: Region, factors: Sequence[Factor], heads: Heads, evaluator: Evaluator) -> Reason | None:
    """Why one of the factors can be multiplied into neither q nor k; None if all can."""
    for factor in factors:
        node = region.others[factor.index]
        varies = _varies(evaluator.sizes.shape(node), heads.masks[factor.target])
        if varies & set(heads.keys) and varies & set(heads.repeats):
            return Reason(
                f"softmax attention, but its scores are multiplied with {node.name}, a factor of keys that is another "
                "one for each query head that shares them",
                3,
            )
    return None


def multiplied(
    q: torch.Tensor,
    k: torch.Tensor,
    factors: Sequence[Factor],
    others: Sequence[torch.Tensor],
    heads: Heads,
    sizes: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k, in their own layouts, with the factors in them."""
    for factor in factors:
        value = others[factor.index]
        axes = heads.masks[factor.target]
        if _varies(tuple(value.shape), axes) & set(heads.keys):
            k = _times(k, heads.k, value, axes, heads, heads.keys, factor.divides, sizes)
        else:
            q = _times(q, heads.q, value, axes, heads, heads.queries, factor.divides, sizes)
    return q, k


def _varies(shape: Sequence[Any], axes: Axes) -> set[str]:
    return {a for axis in aligned(shape, axes) for a in axis}


def _times(
    t: torch.Tensor,
    have: Axes,
    value: torch.Tensor,
    axes: Axes,
    heads: Heads,
    positions: Atoms,
    divides: bool,
    sizes: dict[str, Any],
) -> torch.Tensor:
    """`t`, with its axes split into atoms, times the value."""
    value = value.to(t.dtype)
    if value.dim():
        own = aligned(value.shape, axes)
        split: Axes = tuple((a,) for axis in have for a in axis)
        named = set(heads.batch) | set(heads.groups) | set(heads.repeats) | set(positions)
        value = rearranged(value, own, tuple(axis if set(axis) <= named else () for axis in split), sizes, whole=False)
        t = rearranged(t, have, split, sizes)
        t = t / value if divides else t * value
        return rearranged(t, split, have, sizes)
    return t / value if divides else t * value
