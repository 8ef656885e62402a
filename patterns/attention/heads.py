"""Layouts of q, k, v and the result, and which KV head serves which query head, read off element by element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxfuse.graph.region import Region, between
from fxfuse.graph.view import argument, fake
from fxfuse.patterns.attention.layouts import (
    Atoms,
    Axes,
    Layouts,
    Reading,
    aligned,
    is_one,
    memory_order,
    read_layouts,
    sharing,
    static_atoms,
)
from fxfuse.patterns.attention.parts import Parts
from fxfuse.patterns.attention.score_paths import Followed, Target
from fxfuse.proof.evaluate import Evaluator
from fxfuse.recognise.answers import Reason
from fxfuse.recognise.probe import Probe


@dataclass(frozen=True)
class Heads:
    """The layouts of q, k, v and the result, each axis as the atoms it counts: parts of batch, heads, positions,
    features."""

    q: Axes
    k: Axes
    v: Axes
    out: Axes
    masks: tuple[Axes, ...]
    """Of the shapes that masks broadcast against."""
    batch: Atoms
    groups: Atoms
    """The KV heads."""
    repeats: Atoms
    """The query heads that share one KV head."""
    queries: Atoms
    keys: Atoms
    features: tuple[Atoms, Atoms]
    """The features of q and k, and those of v and the result."""
    numbers: dict[str, int]
    """The size of each atom whose size does not depend on a symbol."""
    q_heads: int
    kv_heads: int
    head_size: int
    v_head_size: int
    scale: float
    """What q and k are multiplied with on their way to the product."""
    in_turn: bool
    """Query heads that share a KV head do not lie side by side in q: they are moved."""

    @property
    def flat(self) -> bool:
        """Do the heads of q, k and v lie side by side behind the positions, so that nothing has to be transposed?"""
        heads = (*self.groups, *self.repeats)
        own = (
            (self.q, heads, self.queries, self.features[0]),
            (self.k, self.groups, self.keys, self.features[0]),
            (self.v, self.groups, self.keys, self.features[1]),
        )
        return all(_is_flat(axes, (*self.batch, *positions), (*inner, *f)) for axes, inner, positions, f in own)

    def operand(self, heads: Atoms, positions: Atoms, features: Atoms, flat: bool) -> Axes:
        """``[B, S, H·D]`` if flat, else ``[B, H, S, D]``."""
        if flat:
            return self.batch, positions, (*heads, *features)
        return self.batch, heads, positions, features

    def lengths(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
        """The size of each atom of these tensors, numbers or symbols."""
        found: dict[str, Any] = dict(self.numbers)
        for t, axes in ((q, self.q), (k, self.k), (v, self.v)):
            for size, axis in zip(t.shape, axes, strict=True):
                unknown = [a for a in axis if a not in found]
                if len(unknown) == 1:
                    found[unknown[0]] = size if len(axis) == 1 else size // math.prod(found.get(a, 1) for a in axis)
        return found


def _is_flat(axes: Axes, outer: Atoms, inner: Atoms) -> bool:
    if len(inner) == 1 and () in axes:
        return False  # an axis of size 1, for one head, stands between
    order = memory_order(axes)
    return order[-len(inner) :] == inner and order[: -len(inner)] == tuple(a for a in outer if a in order)


@dataclass(frozen=True)
class Operands:
    """Where the elements of q, k, v and the result are, over the matrices of the first product."""

    readings: tuple[Reading, Reading, Reading, Reading]
    scale: float


def measure_heads(
    region: Region, parts: Parts, followed: Followed | None, evaluator: Evaluator, ask: Probe
) -> Operands | Reason:
    """Send element numbers from each source to its operand, and see where they arrive."""
    arrived: list[torch.Tensor] = []
    scales: list[float] = []
    operands = ("q", parts.q), ("k", parts.k), ("v", parts.v)
    for (what, operand), source in zip(operands, region.sources, strict=True):
        arrival = _arrivals(region, source, operand, evaluator, ask)
        if isinstance(arrival, Reason):
            return Reason(f"attention, but {what} {arrival.text}", 2)
        arrived.append(arrival[0] - 1)
        scales.append(arrival[1])
    q, k, v = arrived
    q_scale, k_scale, v_scale = scales
    if v_scale != 1.0:
        return Reason("attention, but v is scaled: scale the result instead", 2)
    out = _result(region, parts, evaluator)
    if out is None:
        return Reason("attention, but its result is mixed with other tensors where it is moved", 2)
    if parts.scores is not None and parts.weighted is not None and followed is not None:
        q, k = _together(parts.scores.rows(q), parts.scores.columns(k))
        weights = torch.empty(evaluator.sizes.shape(parts.weighted.left))
        _, v = _together(parts.weighted.rows(weights), parts.weighted.columns(v).transpose(-1, -2))
        out = parts.weighted.result(out)
        out = out.reshape(-1, *out.shape[-2:])
        if not len(v) == len(out) == len(q) == len(followed.matrices):
            return Reason("attention, but its weights are shared by more values than there are scores", 2)
        v, out = v[followed.matrices], out[followed.matrices]
    else:
        if argument(parts.softmax, "enable_gqa") and k.shape[-3] != q.shape[-3]:
            repeats = q.shape[-3] // k.shape[-3]
            k, v = k.repeat_interleave(repeats, -3), v.repeat_interleave(repeats, -3)
        q, k, v = _together(q, k, v)
        out = out.reshape(-1, *out.shape[-2:])
    shapes = [evaluator.sizes.shape(n) for n in (*region.sources, region.output)]
    kinds = ("s", "d"), ("t", "d"), ("t", "e"), ("s", "e")
    readings = [Reading(f, s, *kind) for f, s, kind in zip((q, k, v, out), shapes, kinds, strict=True)]
    return Operands((readings[0], readings[1], readings[2], readings[3]), q_scale * k_scale)


def settle_heads(
    region: Region, operands: Operands, targets: Sequence[Target] = (), broadcast: Sequence[tuple[Node, int]] = ()
) -> Heads | Reason:
    """Decide which atoms are batch and which are heads.

    Args:
        targets: shapes that the scores take on their way; their layouts are worked out too.
        broadcast: what broadcasts against them (masks), each with the number of its target.
    """
    masks = [Reading(t.places, t.shape, "s", "t") for t in targets]
    found = read_layouts([*operands.readings, *masks])
    if found is None:
        return _unreadable(operands)
    q, k, v, out = found.axes[:4]
    nodes = (*region.sources, region.output)
    static = {a for axes, node in zip(found.axes, nodes, strict=False) for a in static_atoms(axes, fake(node).shape)}
    for node, target in broadcast:
        static |= static_atoms(aligned(fake(node).shape, found.axes[4 + target]), fake(node).shape)
    lead = found.of("n")
    served = set(memory_order(k)) | set(memory_order(v))
    heads = _heads(found, lead, static, served)
    if not heads <= static:
        return Reason("attention, but its number of heads depends on the sizes of the inputs", 3)
    groups = tuple(a for a in lead if a in heads and a in served)
    repeats = tuple(a for a in lead if a in heads and a not in served)
    features = found.of("d"), found.of("e")
    if not all(len(f) == 1 and set(f) <= static for f in features):
        return Reason("attention, but the features of a head do not lie side by side, or their number may vary", 2)
    own = [a for a in memory_order(q) if a in heads]
    kv_heads = math.prod(found.sizes[a] for a in groups)
    if own and set(own) == heads and set(own) & set(repeats):
        groups = tuple(a for a in own if a in groups)
        repeats = tuple(a for a in own if a in repeats)
    in_turn = bool(groups and repeats) and tuple(a for a in own if a in repeats or a in groups) != (*groups, *repeats)
    return Heads(
        *(q, k, v, out),
        found.axes[4:],
        batch=tuple(a for a in lead if a not in heads),
        groups=groups,
        repeats=repeats,
        queries=found.of("s"),
        keys=found.of("t"),
        features=features,
        numbers={a: size for a, size in found.sizes.items() if a in static},
        q_heads=kv_heads * math.prod(found.sizes[a] for a in repeats),
        kv_heads=kv_heads,
        head_size=found.sizes[features[0][0]],
        v_head_size=found.sizes[features[1][0]],
        scale=operands.scale,
        in_turn=in_turn,
    )


def _heads(found: Layouts, lead: Atoms, static: set[str], served: set[str]) -> set[str]:
    """The atoms of the matrices that are heads; the others are batch.

    An atom is a head if it shares an axis with the features, or if several of it read one key. Where neither tells, the
    innermost of the other axes of q holds the heads.
    """
    q = found.axes[0]
    beside = {a for axes in found.axes[:4] for a in sharing(axes, found.of("d") + found.of("e"))} & set(lead) & static
    shared = {a for a in lead if a not in served and a in static}
    heads = beside | shared
    if shared and not heads & served:  # the KV heads, before the repeats
        before = lead[: lead.index(min(shared, key=lead.index))]
        heads |= {before[-1]} & static if len(before) > 1 else set()
    inner = [a for a in memory_order(q) if a in static and a in lead]
    if not heads and inner and (len(lead) > 1 or (len(q) > 3 and inner[-1] not in q[0])):
        heads = {inner[-1]}
    whole = {a for a in sharing(q, heads) if a in lead}
    return heads | (whole if whole <= static and len(heads | whole) < len(lead) else set())


def _unreadable(operands: Operands) -> Reason:
    """The reason that names the tensor whose layout could not be read."""
    for what, reading in zip(("q", "k", "v"), operands.readings, strict=False):
        if read_layouts([reading]) is None:
            return Reason(f"attention, but the elements of {what} are not heads of a batch in order", 2)
    if read_layouts([operands.readings[3]]) is None:
        return Reason("attention, but its result is not heads of a batch in any order of axes", 2)
    return Reason("attention, but the axes of q, k, v, the masks and the result do not fit together", 2)


def _together(*matrices: torch.Tensor) -> list[torch.Tensor]:
    """The matrices of each operand of one product, broadcast to one another, as ``[N, rows, columns]``."""
    lead: tuple[int, ...] = torch.broadcast_shapes(*(m.shape[:-2] for m in matrices))  # type: ignore[no-untyped-call]
    return [m.expand(*lead, *m.shape[-2:]).reshape(-1, *m.shape[-2:]) for m in matrices]


def _arrivals(
    region: Region, source: Node, operand: Node, evaluator: Evaluator, ask: Probe
) -> tuple[torch.Tensor, float] | Reason:
    """The elements of `source` are numbered from 1 and sent to `operand`: the numbers as they arrive there, and the
    constant that they were multiplied with on the way."""
    shape = evaluator.sizes.shape(source)
    numbers = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64).reshape(shape)
    if operand is source:
        return numbers, 1.0
    way = between(region.view, operand, [source], lambda _: True)
    if way is None or any(fake(n).dtype.is_floating_point for n in way.others):
        return Reason("is mixed with other tensors on the way")
    indices = ask.draws(way.others, evaluator, 51)
    scale = evaluator.region(way, [torch.ones_like(numbers), *indices])
    if not torch.allclose(scale, scale.flatten()[:1], rtol=1e-12) or scale.flatten()[0] == 0:
        return Reason("is not only moved and scaled on the way")
    factor = scale.flatten()[0].item()
    arrived = evaluator.region(way, [numbers, *indices]) / factor
    whole = arrived.round()
    return (whole, factor) if torch.allclose(arrived, whole, atol=1e-3) else Reason("is not only moved and scaled")


def _result(region: Region, parts: Parts, evaluator: Evaluator) -> torch.Tensor | None:
    """Of each element of the second product, where it ends up in the region's output."""
    shape = evaluator.sizes.shape(parts.output)
    count = torch.Size(shape).numel()
    numbers = torch.arange(count, dtype=torch.float64).reshape(shape)
    if region.output is parts.output:
        return numbers
    way = between(region.view, region.output, [parts.output], lambda _: True)
    if way is None or way.others:
        return None
    final = evaluator.region(way, [numbers]).reshape(-1).long()
    places = torch.full((count,), -1, dtype=torch.int64)
    if final.numel() != count:
        return None
    places[final] = torch.arange(count)
    return None if bool((places < 0).any()) else places.double().reshape(shape)


def length_of(node: Node, axes: Axes, atoms: Atoms) -> Any:
    """The size that these atoms have together in a tensor, a number or a symbol; None where they share an axis with
    others."""
    count: Any = 1
    if not atoms and any(not axis and not is_one(size) for axis, size in zip(axes, fake(node).shape, strict=True)):
        return None  # there was one of them where it was asked: which axis counts them does not show
    for axis, size in zip(axes, fake(node).shape, strict=True):
        if set(axis) & set(atoms):
            if not set(axis) <= set(atoms):
                return None
            count = count * size
    return count


def statically_square(region: Region, heads: Heads) -> bool:
    """Are there as many queries as keys, whatever the sizes?"""
    rows = length_of(region.sources[0], heads.q, heads.queries)
    columns = length_of(region.sources[1], heads.k, heads.keys)
    return rows is not None and str(rows) == str(columns)
