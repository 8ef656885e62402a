"""The RotaryEmbedding that replaces a rotation: its layout, its caches, its dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from fxfuse.graph.region import Region
from fxfuse.graph.view import fake, op_name, static
from fxfuse.patterns.rotary_embedding.rotation import Rotation
from fxfuse.patterns.rotary_embedding.tables import Caches
from fxfuse.recognise.answers import Form


@dataclass(frozen=True)
class Layout:
    """Which axes of x are what: ``[*batch, S, *heads, D]`` or ``[B, *heads, S, D]``."""

    batch: int
    """Number of leading axes that are batch."""
    sequence: int
    rank: int
    swapped: bool
    """Is x ``[B, H, S, D]`` because the model transposed it just before? The operator's 3-D form then reads what was
    transposed, and needs no transpose."""

    @property
    def heads_last(self) -> bool:
        return self.sequence == self.batch


def rotary_forms(region: Region, rotation: Rotation, rows: tuple[Caches, ...]) -> tuple[Form, ...]:
    """Two forms for the proof to choose from: in the dtype of the model's products, and in float32. Both are cast back.

    Args:
        rows: cos and sin once if both rows of a pair use one angle; else those of the first rows and of the second.
    """
    (x,) = region.sources
    layouts = [_layout(x, caches) for caches in rows]
    out = fake(region.output).dtype
    read = [fake(region.others[c.index]) for caches in rows for c in (caches.cos, caches.sin)]
    product = fake(x).dtype
    for cache in read:
        real = torch.empty(0, dtype=cache.dtype).real.dtype
        product = torch.promote_types(product, real)

    def form(inside: torch.dtype) -> Form:
        def rotary_embedding(*inputs: torch.Tensor) -> torch.Tensor:
            kind = torch.float64 if inputs[0].dtype == torch.float64 else inside
            y, *second = (
                rotation.pairing.arrange(_rotate(layout, rotation, caches, inputs, kind))
                for layout, caches in zip(layouts, rows, strict=True)
            )
            y = rotation.pairing.joined(y, *second) if second else y
            return y if y.dtype in (out, torch.float64) else y.to(out)

        return rotary_embedding

    return tuple(form(d) for d in dict.fromkeys((product, torch.float32)))


def _rotate(
    layout: Layout,
    rotation: Rotation,
    caches: Caches,
    inputs: tuple[torch.Tensor, ...],
    dtype: torch.dtype,
    read: tuple[int, ...] = (),
) -> torch.Tensor:
    x, others = inputs[0], inputs[1:]
    if layout.batch == 0 and layout.rank > 3:  # [S, B, *heads, D]
        inner_layout = replace(layout, batch=1, sequence=1)
        return _rotate(inner_layout, rotation, caches, (x.transpose(0, 1), *others), dtype, (0,)).transpose(0, 1)
    shape = x.shape
    axes = read or (*range(layout.batch), layout.sequence)
    sizes = [shape[a] for a in (*range(layout.batch), layout.sequence)]
    y: torch.Tensor
    x = x if x.dtype == dtype else x.to(dtype)
    tables = []
    for cache in (caches.cos, caches.sin):
        table = cache.read(others[cache.index], axes)
        table = table.unsqueeze(0) if read else table
        table = table.expand(*sizes, cache.pairs)
        table = table.flatten(0, layout.batch - 1) if layout.batch > 1 else table
        table = table.unsqueeze(0) if layout.batch == 0 else table
        tables.append(table if table.dtype == dtype else table.to(dtype))
    partial = rotation.rotary_dim if rotation.rotary_dim < rotation.dim else 0
    attributes = {"interleaved": int(rotation.interleaved), "rotary_embedding_dim": partial}

    x = x.transpose(1, 2) if layout.swapped else x
    inner = x.shape
    x = x.unsqueeze(0) if layout.batch == 0 else x.flatten(0, layout.batch - 1) if layout.batch > 1 else x
    if layout.heads_last or layout.swapped:
        heads = math.prod(x.shape[2:-1])
        flat = x.flatten(2) if x.dim() > 3 else x
        y = torch.ops.fxfuse.rotary_embedding(flat, *tables, num_heads=heads, **attributes)
    else:
        x = x.flatten(1, -3) if x.dim() > 4 else x
        y = torch.ops.fxfuse.rotary_embedding(x, *tables, **attributes)
    y = y if y.shape == inner else y.view(inner)
    return y.transpose(1, 2) if layout.swapped else y


def _layout(x: Node, caches: Caches) -> Layout:
    """Axes along which cos and sin differ are positions (or batch); those along which they do not are heads."""
    value = fake(x)
    rank = value.dim()
    axes = caches.cos.axes | caches.sin.axes
    ones = [a for a in range(1, rank - 1) if static(value.shape[a]) == 1]
    if axes - {0} or rank == 2:
        sequence = max(axes) if axes else 0
    else:
        sequence = ones[0] if ones else (0 if axes == {0} else 1)
    heads_after = sequence < rank - 2
    if heads_after or sequence <= 1:
        return Layout(batch=sequence, sequence=sequence, rank=rank, swapped=False)
    batch = max((a for a in axes if a < sequence), default=0) + 1
    if batch == sequence:
        return Layout(batch=sequence, sequence=sequence, rank=rank, swapped=False)
    swapped = rank == 4 and sequence == 2 and batch == 1 and _is_swap(x)
    return Layout(batch=batch, sequence=sequence, rank=rank, swapped=swapped)


def _is_swap(x: Node) -> bool:
    """Is x made by a transpose of heads and sequence?"""
    if op_name(x) in ("transpose", "swapaxes", "swapdims", "movedim"):
        return {a % 4 for a in x.args[1:3] if isinstance(a, int)} == {1, 2}
    return op_name(x) == "permute" and list(x.args[1]) == [0, 2, 1, 3]  # type: ignore[arg-type]
