"""Is a region a rotation of pairs of features? If so, of which pairs, and by which cos and sin?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxfuse.graph.region import Region
from fxfuse.graph.view import fake, static
from fxfuse.patterns.rotary_embedding.angles import one_angle, while_loaded
from fxfuse.patterns.rotary_embedding.pairing import Pairing, pairing_of
from fxfuse.proof.evaluate import Evaluator
from fxfuse.proof.positions.claims import same_at_every_size
from fxfuse.recognise.answers import Reason
from fxfuse.recognise.probe import Probe

_TINY = 1e-12
_CLOSE = 1e-9


@dataclass(frozen=True)
class Rotation:
    """What one-hot features showed, at the sizes of `evaluator`."""

    evaluator: Evaluator
    inputs: list[torch.Tensor]
    """The values of `Region.others` during the measurement; every element occurs once."""
    dim: int
    """Features of a position, the last axis of x."""
    pairing: Pairing
    cos: torch.Tensor
    """``[*positions, rotary_dim / 2]``: the cos of each pair at each position of x."""
    sin: torch.Tensor
    """``[*positions, rotary_dim / 2]``"""
    from_leaves: bool
    """Do the two rows of a pair use one angle in this program, though they read different elements?"""
    claim: str = ""
    """How that was decided."""
    second: tuple[torch.Tensor, torch.Tensor] | None = None
    """cos and sin of the second row of each pair, where it may use another angle than the first."""

    @property
    def rows(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """cos and sin, once where both rows of a pair use one angle."""
        return [(self.cos, self.sin), *([] if self.second is None else [self.second])]

    @property
    def rotary_dim(self) -> int:
        """How many features, from the first on, are rotated."""
        return 2 * len(self.pairing.first)

    @property
    def interleaved(self) -> bool:
        return self.pairing.interleaved


def measure_rotation(region: Region, ask: Probe) -> Rotation | Reason:
    """Ask the region which features reach which, then for cos and sin at every position, then whether that is all."""
    evaluator = ask.evaluator(0)
    others = [_unique(t, i) for i, t in enumerate(ask.draws(region.others, evaluator, seed=3))]
    (x,) = region.sources
    shape = evaluator.sizes.shape(x)
    if shape[-1] == 2 and len(shape) > 4:
        return Reason("a rotation of single pairs, part of a wider one")
    signs = _signs(region, shape[-1], evaluator, ask)
    others = [signs.get(i, t) for i, t in enumerate(others)]
    sample = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    y = evaluator.region(region, [sample, *others])
    if y.shape != sample.shape or y.is_complex():
        return Reason("its output has another shape than its input at the probed sizes")
    if evaluator.region(region, [torch.zeros_like(sample), *others]).abs().max() > 0:
        return Reason("f(0) is not 0")
    pairing = pairing_of(_reaches(region, evaluator, others))
    if isinstance(pairing, Reason):
        return pairing
    cos, sin, minus_sin, other_cos = _rows_of(region, evaluator, others, pairing)
    together = torch.allclose(cos, other_cos, rtol=_CLOSE) and torch.allclose(sin, -minus_sin, rtol=_CLOSE)
    first, second = sample[..., pairing.first], sample[..., pairing.second]
    expected = sample.clone()
    expected[..., pairing.out_first] = cos * first + minus_sin * second
    expected[..., pairing.out_second] = sin * first + other_cos * second
    if not torch.allclose(expected, y, rtol=1e-9, atol=1e-9):
        if together:
            return Reason("a rotation, but scaled by what is computed of x itself", 2)
        return Reason("pairs of features are mixed, but not linearly and position by position, or others are scaled", 1)
    if together:
        return Rotation(evaluator, others, shape[-1], pairing, cos, sin, bool(signs))
    rows = (cos, other_cos, sin, minus_sin)
    apart = one_angle(region, others, rows, ask.reader)
    if not isinstance(apart, Reason):
        return Rotation(evaluator, others, shape[-1], pairing, cos, sin, True, apart)
    claim = while_loaded(region, others, rows, ask)
    if claim is None:
        return apart
    return Rotation(evaluator, others, shape[-1], pairing, cos, -minus_sin, bool(signs), claim, (other_cos, sin))


def _signs(region: Region, dim: int, evaluator: Evaluator, ask: Probe) -> dict[int, torch.Tensor]:
    """Constants of 0, 1 and -1 that permute features (x @ P) or change their signs (x · sign): these are no tables of
    cos or sin, so they keep their values while everything else is drawn."""
    found = {}
    for index, node in enumerate(region.others):
        shape = tuple(static(s) for s in fake(node).shape)  # comparing a symbol would add a guard
        if shape[-1:] != (dim,) or any(s not in (1, dim) for s in shape[:-1]) or ask.depends_on_input(node):
            continue
        if not (ask.is_fixed(node) or same_at_every_size(ask.reader, node)):
            continue
        (value,) = ask.leaf_values([node], evaluator, 3)
        if bool(((value == 0) | (value.abs() == 1)).all()) and bool((value < 0).any() or len(shape) > 1):
            found[index] = value
    return found


def _reaches(region: Region, evaluator: Evaluator, others: list[torch.Tensor]) -> torch.Tensor:
    """``[D out, D in]``: which feature reaches which. One evaluation asks each position about another feature."""
    shape = evaluator.sizes.shape(region.sources[0])
    dim = shape[-1]
    positions = torch.Size(shape[:-1]).numel()
    reaches = torch.zeros(dim, dim, dtype=torch.bool)
    for start in range(0, dim, positions):
        asked = (torch.arange(positions) + start) % dim
        one_hot = torch.nn.functional.one_hot(asked, dim).double().reshape(shape)
        arrived = evaluator.region(region, [one_hot, *others]).reshape(positions, dim).abs() > _TINY
        for position, feature in enumerate(asked.tolist()[:dim]):
            reaches[:, feature] |= arrived[position]
    return reaches


def _rows_of(
    region: Region, evaluator: Evaluator, others: list[torch.Tensor], pairing: Pairing
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """cos, sin, -sin and cos of every pair. Two evaluations suffice, because pairs do not reach one another."""
    shape = evaluator.sizes.shape(region.sources[0])
    read: list[torch.Tensor] = []
    for ones in (pairing.first, pairing.second):
        x = torch.zeros(shape, dtype=torch.float64)
        x[..., ones] = 1
        y = evaluator.region(region, [x, *others])
        read.extend((y[..., pairing.out_first], y[..., pairing.out_second]))
    return read[0], read[1], read[2], read[3]


def _unique(values: torch.Tensor, index: int) -> torch.Tensor:
    """Values that occur once, and are far from 0, so that a product with them is seen."""
    if not (values.dtype.is_floating_point or values.dtype.is_complex):
        return values
    if values.dtype.is_complex:
        parts = torch.view_as_real(values)
        return torch.view_as_complex(parts + 0.25 * parts.sign() + index * 1e-3)
    return values + 0.25 * values.sign() + index * 1e-3
