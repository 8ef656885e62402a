"""A normalisation asked for its scale and its epsilon, and why it is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxfuse.graph.region import Region, between
from fxfuse.graph.view import GraphView, fake, is_float, static
from fxfuse.proof.evaluate import draw, generator
from fxfuse.recognise.answers import Reason
from fxfuse.recognise.literals import snap
from fxfuse.recognise.probe import Probe
from fxfuse.recognise.walk import forward


def _as_long(node: Node, size: int) -> bool:
    """Is the last axis this long, statically?"""
    value = fake(node)
    return value.dim() > 0 and static(value.shape[-1]) == size


_DEFAULTS = {torch.finfo(kind).eps for kind in (torch.float32, torch.float64)}
"""What `rms_norm` adds without an eps."""


def regions_around(
    view: GraphView, anchor: Node, sources: Sequence[Node], walked: Callable[[str], bool], depth: int, most: int
) -> Iterator[Region]:
    """Regions that hold the root of a norm: outputs behind it, nearest first, each with inputs of its shape before it.

    Args:
        anchor: the root.
        sources: what the region may begin with, nearest first.
        walked: the operators, by name, that a norm may be spelled with.
        depth: how many steps behind the root an output may lie.
        most: regions of one output.
    """
    for output in forward(view, anchor, walked, depth=depth, limit=24):
        if not is_float(output) or fake(output).dim() < 1:
            continue
        tried = 0
        for source in sources:
            if source is output or not is_float(source) or not view.same_shape(source, output):
                continue
            region = between(view, output, [source], walked, limit=40)
            if region is not None and anchor in region.nodes:
                tried += 1
                yield region
            if tried == most:
                break


class NormFunction:
    """The region as a function of x alone."""

    def __init__(self, region: Region, ask: Probe, seed: int) -> None:
        self.region = region
        self.evaluator = ask.evaluator(0)
        gen = generator(seed)
        size = fake(region.sources[0]).shape[-1]
        # An epsilon or a 1 held in a tensor keeps its value; whatever may be the scale is drawn.
        candidates = [n for n in region.others if not _as_long(n, size)]
        found = {n: ask.one_number(n, self.evaluator) for n in candidates}
        values = {n: value for n, value in found.items() if value is not None}
        self.others = [values[n] if n in values else draw(n, self.evaluator, gen).abs() + 0.5 for n in region.others]
        self.free = [i for i, n in enumerate(region.others) if n not in values]
        self.numbers = {float(v.flatten()[0]) for v in values.values()} | _DEFAULTS
        """Numbers that it reads from tensors, or that its operators take by default."""
        self.from_leaves = bool(values)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.evaluator.region(self.region, [x, *self.others])


def precisely(f: NormFunction, big: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The scale from inputs beside which no epsilon shows; what it was, where they are too large for the region."""
    huge = big * 1e5
    ratio = f(huge) * huge.square().mean(-1, keepdim=True).sqrt() / huge
    found = ratio.reshape(-1, scale.numel())[0]
    return found if torch.allclose(found, scale, rtol=1e-6) else scale


@dataclass(frozen=True)
class Scale:
    """factor · (the tensor at `position` of the inputs) + offset; the constant `offset` where there is no tensor."""

    position: int | None
    factor: float
    offset: float

    def __call__(self, inputs: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
        if self.position is None:
            return torch.full((inputs[0].shape[-1],), self.offset, dtype=dtype, device=inputs[0].device)
        scale = cast(inputs[self.position], dtype)
        scale = scale.reshape(-1) if scale.dim() != 1 else scale
        scale = scale if self.factor == 1 else scale * self.factor
        return scale if self.offset == 0 else scale + self.offset


def scale_source(region: Region, f: list[NormFunction], scales: list[torch.Tensor]) -> Scale | Reason:
    """Which tensor the scale is, or a multiple of and a constant more than; or the constant it is."""
    if len(f[0].free) > 1:
        return Reason("RMSNorm, but it reads more than one tensor besides x", 2)
    for index in f[0].free:
        drawn = [g.others[index].reshape(-1) for g in f]
        if any(d.numel() != s.numel() for d, s in zip(drawn, scales, strict=True)):
            continue
        factor = (scales[0] - scales[1]) / (drawn[0] - drawn[1])
        offset = scales[0] - factor * drawn[0]
        if _constant(factor) and _constant(offset):
            numbers = f[0].numbers
            multiple = snap(factor[0].item(), region, known=numbers)
            return Scale(1 + index, multiple, snap(offset[0].item(), region, known=numbers, noise=1e-10))
    if f[0].free or not _constant(torch.cat(scales)):
        return Reason("RMSNorm, but its weight is none of the tensors it reads", 2)
    return Scale(None, 1.0, snap(scales[0][0].item(), region, known=f[0].numbers))


def _constant(values: torch.Tensor) -> bool:
    return torch.allclose(values, values[:1].expand_as(values), rtol=1e-5, atol=1e-5)


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x if x.dtype == dtype else x.to(dtype)
