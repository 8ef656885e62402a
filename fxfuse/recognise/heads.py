"""Layouts of q, k, v and the result, and which KV head serves which query head, read off element by element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import Node

from fxfuse.graph.region import Region, between
from fxfuse.graph.view import argument, fake
from fxfuse.proof.evaluate import Evaluator
from fxfuse.recognise.answers import Reason
from fxfuse.recognise.attention_parts import Parts
from fxfuse.recognise.questions import Questions

Axes = Literal["BSX", "BSHD", "BHSD"]
"""``[B, S, H·D]``, ``[B, S, H, D]``, ``[B, H, S, D]``."""


@dataclass(frozen=True)
class Heads:
    """What the layouts are."""

    q: Axes
    k: Axes
    v: Axes
    out: Axes
    q_heads: int
    kv_heads: int
    head_size: int
    v_head_size: int
    scale: float
    """What q and k are multiplied with on their way to the product."""


def measure_heads(region: Region, parts: Parts, evaluator: Evaluator, ask: Questions) -> Heads | Reason:
    """Send element numbers from each source to its operand, and compare where they arrive."""
    q_src, k_src, v_src = region.sources
    arrived: list[torch.Tensor] = []
    scales: list[float] = []
    for what, source, operand in (("q", q_src, parts.q), ("k", k_src, parts.k), ("v", v_src, parts.v)):
        arrival = _arrivals(region, source, operand, evaluator, ask)
        if isinstance(arrival, Reason):
            return Reason(f"attention, but {what} {arrival.text}", 2)
        arrived.append(arrival[0])
        scales.append(arrival[1])
    q, k, v = arrived
    q_scale, k_scale, v_scale = scales
    if v_scale != 1.0:
        return Reason("attention, but v is scaled", 2)
    if parts.scores is not None and parts.weighted is not None:
        q, k = _together(parts.scores.rows(q), parts.scores.columns(k))
        weights = torch.empty(evaluator.sizes.shape(parts.weighted.left))
        _, v = _together(parts.weighted.rows(weights), parts.weighted.columns(v).transpose(-1, -2))
    else:
        if argument(parts.softmax, "enable_gqa") and k.shape[-3] != q.shape[-3]:
            repeats = q.shape[-3] // k.shape[-3]
            k, v = k.repeat_interleave(repeats, -3), v.repeat_interleave(repeats, -3)
        q, k, v = _together(q, k, v)
    if len({t.shape[0] for t in (q, k, v)}) > 1:
        return Reason("attention, but the two products do not run over the same heads", 2)
    batch = evaluator.sizes.shape(q_src)[0]
    if q.shape[0] % batch:
        return Reason("attention, but the first axis of q is not the batch", 1)
    heads = q.shape[0] // batch

    kv_heads = _kv_heads(k_src, k.shape[-1], batch, k.shape[-2], evaluator)
    if kv_heads is None or heads % kv_heads or _kv_heads(v_src, v.shape[-1], batch, v.shape[-2], evaluator) != kv_heads:
        return Reason("attention, but the KV heads cannot be told from the shapes of k and v", 2)
    layouts: dict[str, Axes] = {}
    for what, source, found, own in (("q", q_src, q, heads), ("k", k_src, k, kv_heads), ("v", v_src, v, kv_heads)):
        layout = _layout(found, evaluator.sizes.shape(source), batch, own, heads // own)
        if layout is None and _layout(found, evaluator.sizes.shape(source), batch, own, heads // own, tiled=True):
            return Reason(
                f"attention, but {what} repeats its heads in turn (0 1 0 1), where groups (0 0 1 1) are GQA", 3
            )
        if layout is None:
            return Reason(f"attention, but the elements of {what} are not heads of a batch in order", 2)
        layouts[what] = layout
    out = _out_layout(region, parts, evaluator, batch, heads, (q.shape[-2], v.shape[-1]))
    if out is None:
        return Reason("attention, but its result is in another order", 2)
    sizes = (heads, kv_heads, q.shape[-1], v.shape[-1])
    return Heads(layouts["q"], layouts["k"], layouts["v"], out, *sizes, q_scale * k_scale)


def _together(*matrices: torch.Tensor) -> list[torch.Tensor]:
    """The matrices of each operand of one product, broadcast to one another, as ``[N, rows, columns]``."""
    lead: tuple[int, ...] = torch.broadcast_shapes(*(m.shape[:-2] for m in matrices))  # type: ignore[no-untyped-call]
    return [m.expand(*lead, *m.shape[-2:]).reshape(-1, *m.shape[-2:]) for m in matrices]


def _arrivals(
    region: Region, source: Node, operand: Node, evaluator: Evaluator, ask: Questions
) -> tuple[torch.Tensor, float] | Reason:
    """Element numbers of `source` as they arrive in `operand`, and the constant they were multiplied with."""
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


def _kv_heads(source: Node, size: int, batch: int, length: int, evaluator: Evaluator) -> int | None:
    count = torch.Size(evaluator.sizes.shape(source)).numel()
    return count // (batch * length * size) if count % (batch * length * size) == 0 else None


def _layout(
    found: torch.Tensor, shape: tuple[int, ...], batch: int, heads: int, repeats: int, *, tiled: bool = False
) -> Axes | None:
    """Which layout of the source gives ``found [B·H, S, D]``."""
    length, size = found.shape[-2:]
    numbers = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
    candidates: list[tuple[Axes, tuple[int, ...]]] = [
        ("BSX", (batch, length, heads * size)),
        ("BSHD", (batch, length, heads, size)),
        ("BHSD", (batch, heads, length, size)),
    ]
    for axes, expected in candidates:
        if shape != expected:
            continue
        if axes == "BHSD":
            canonical = numbers.reshape(expected)
        else:
            canonical = numbers.reshape(batch, length, heads, size).transpose(1, 2)
        canonical = canonical.repeat(1, repeats, 1, 1) if tiled else canonical.repeat_interleave(repeats, 1)
        if torch.equal(canonical.reshape(-1, length, size), found):
            return axes
    return None


def _out_layout(
    region: Region, parts: Parts, evaluator: Evaluator, batch: int, heads: int, matrix: tuple[int, int]
) -> Axes | None:
    """Where the elements of the second product end up in the region's output."""
    product = parts.output
    shape = evaluator.sizes.shape(product)
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    canonical = parts.weighted.result(numbers) if parts.weighted is not None else numbers
    canonical = canonical.reshape(batch, heads, *matrix)
    if region.output is product:
        final = numbers
    else:
        way = between(region.view, region.output, [product], lambda _: True)
        if way is None or way.others:
            return None
        final = evaluator.region(way, [numbers])
    expected: list[tuple[Axes, torch.Tensor]] = [
        ("BSX", canonical.transpose(1, 2).flatten(2)),
        ("BSHD", canonical.transpose(1, 2)),
        ("BHSD", canonical),
    ]
    return next((axes for axes, e in expected if e.shape == final.shape and torch.equal(e, final)), None)


def statically_square(region: Region, heads: Heads) -> bool:
    """Are there as many queries as keys, whatever the sizes?"""

    def length(node: Node, axes: Axes) -> str:
        return str(fake(node).shape[2 if axes == "BHSD" else 1])

    return length(region.sources[0], heads.q) == length(region.sources[1], heads.k)
