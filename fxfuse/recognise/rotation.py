"""Is a region a rotation of feature pairs? Which pairs, and by which cos and sin?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxfuse.graph.region import Region
from fxfuse.recognise.answers import Reason
from fxfuse.recognise.evaluate import MAX_ELEMENTS, CannotEvaluate, Evaluator
from fxfuse.recognise.questions import Questions

_TINY = 1e-12
_CLOSE = 1e-9
_LONG = (1 << 17, 1 << 13, 1 << 10, 1 << 7)
"""Sequence lengths to meet a table with: the longest that fits in memory."""


@dataclass(frozen=True)
class Rotation:
    """What one-hot features showed, at the sizes of `evaluator`."""

    evaluator: Evaluator
    inputs: list[torch.Tensor]
    """The values of `Region.others` it was measured with: every element unique."""
    dim: int
    """Features of a position, the last axis of x."""
    rotary_dim: int
    """How many of them, from the first on, are rotated."""
    interleaved: bool
    cos: torch.Tensor
    """``[*positions, rotary_dim / 2]``: the cos of each pair at each position of x."""
    sin: torch.Tensor
    """``[*positions, rotary_dim / 2]``"""
    from_leaves: bool
    """The two rows of a pair use one angle in this program, though they read different elements."""


def measure_rotation(region: Region, ask: Questions) -> Rotation | Reason:
    """Ask the region for its matrix at every position, and read the pairing off it."""
    evaluator = ask.evaluator(0)
    others = [_unique(t, i) for i, t in enumerate(ask.draws(region.others, evaluator, seed=3))]
    matrix = _matrix(region, evaluator, others)
    if isinstance(matrix, Reason):
        return matrix
    pairing = _pairing(matrix)
    if isinstance(pairing, Reason):
        return pairing
    first, second, interleaved = pairing
    rotary = 2 * len(first)
    cos, other_cos = matrix[..., first, first], matrix[..., second, second]
    sin, minus_sin = matrix[..., second, first], matrix[..., first, second]
    together = torch.allclose(cos, other_cos, rtol=_CLOSE) and torch.allclose(sin, -minus_sin, rtol=_CLOSE)
    if not together:
        apart = _same_angles_here(region, ask, first, second)
        if apart is not None:
            return apart
    return Rotation(evaluator, others, matrix.shape[-1], rotary, interleaved, cos, sin, from_leaves=not together)


def _matrix(region: Region, evaluator: Evaluator, others: list[torch.Tensor]) -> torch.Tensor | Reason:
    """``[*positions, D out, D in]``, or why the region is no linear map of each position's features."""
    (x,) = region.sources
    shape = evaluator.sizes.shape(x)
    gen = torch.Generator().manual_seed(4)
    sample = torch.randn(shape, dtype=torch.float64, generator=gen)

    def f(values: torch.Tensor) -> torch.Tensor:
        return evaluator.region(region, [values, *others])

    y = f(sample)
    if y.shape != sample.shape or y.is_complex():
        return Reason("its output has another shape than its input at the probed sizes")
    if f(torch.zeros_like(sample)).abs().max() > 0:
        return Reason("f(0) is not 0")
    if not torch.allclose(f(2 * sample), 2 * y, rtol=1e-9, atol=1e-9):
        return Reason("not linear in x")
    columns = []
    for feature in range(shape[-1]):
        one_hot = torch.zeros(shape, dtype=torch.float64)
        one_hot[..., feature] = 1
        columns.append(f(one_hot))
    matrix = torch.stack(columns, -1)
    mixed = (matrix @ sample.unsqueeze(-1)).squeeze(-1)
    if not torch.allclose(mixed, y, rtol=1e-9, atol=1e-9):
        return Reason("positions reach one another")
    return matrix


def _pairing(matrix: torch.Tensor) -> tuple[list[int], list[int], bool] | Reason:
    """First and second feature of each pair, and whether pairs are interleaved."""
    dim = matrix.shape[-1]
    flat = matrix.reshape(-1, dim, dim)
    reaches = (flat.abs() > _TINY).any(0)
    rows = [torch.nonzero(reaches[d]).flatten().tolist() for d in range(dim)]
    rotated = [d for d in range(dim) if rows[d] != [d]]
    if not rotated:
        return Reason("no feature reaches another")
    if any(len(rows[d]) != 2 for d in rotated):
        return Reason("not two features to a row")
    count = len(rotated)
    if rotated != list(range(count)):
        if rotated == list(range(rotated[0], rotated[0] + count)):
            return Reason("a rotation, but not of the first features: ONNX rotates the head of each vector", 1)
        return Reason("a rotation of features that are not next to one another", 1)
    if not torch.allclose(flat[:, range(count, dim), range(count, dim)], torch.ones(1, dtype=flat.dtype)):
        return Reason("a rotation, but the features that are not rotated are scaled", 2)
    if any(d not in rows[d] for d in rotated):
        return Reason("a rotation whose result is permuted (its rows and columns pair differently)", 2)
    half = count // 2
    if count % 2 == 0 and all(rows[i] == [i, i + half] == rows[i + half] for i in range(half)):
        interleaved = count == 2
        return list(range(half)), list(range(half, count)), interleaved
    if count % 2 == 0 and all(rows[2 * i] == [2 * i, 2 * i + 1] == rows[2 * i + 1] for i in range(half)):
        return list(range(0, count, 2)), list(range(1, count, 2)), True
    return Reason("a rotation, but its pairs are neither halves nor neighbours", 2)


def _same_angles_here(region: Region, ask: Questions, first: list[int], second: list[int]) -> Reason | None:
    """Do both rows of each pair use one angle for the values that the others take in this program?

    Constants are met whole: once with a sequence as long as the table, positions counting through it.
    """
    asked = [(ask.evaluator(0), 31), (ask.evaluator(1), 32)]
    long = (ask.stretched(limit) for limit in _LONG)
    asked.extend([(e, 34) for e in long if _elements(region, e) <= MAX_ELEMENTS // 4][:1])
    for evaluator, seed in asked:
        try:
            others = ask.leaf_values(region.others, evaluator, seed, cover=seed % 2 == 0)
            matrix = _rows_of(region, evaluator, others, first, second)
        except CannotEvaluate as error:
            return Reason(f"a rotation, but whether both rows of a pair use one angle cannot be told: {error}", 3)
        cos, sin, minus_sin, other_cos = matrix
        if not _close(cos, other_cos) or not _close(sin, -minus_sin):
            opposite = _close(sin, minus_sin)
            why = "the signs of sin agree (a reflection)" if opposite else "their cos or sin differ"
            return Reason(f"a rotation but for the angles of the two rows of a pair: {why}", 3)
    return None


def _rows_of(
    region: Region, evaluator: Evaluator, others: list[torch.Tensor], first: list[int], second: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """cos, sin, -sin and cos of every pair, from two evaluations: pairs do not reach one another."""
    shape = evaluator.sizes.shape(region.sources[0])
    read = []
    for ones in (first, second):
        x = torch.zeros(shape, dtype=torch.float64)
        x[..., ones] = 1
        read.append(evaluator.region(region, [x, *others]))
    return read[0][..., first], read[0][..., second], read[1][..., first], read[1][..., second]


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def _elements(region: Region, evaluator: Evaluator) -> int:
    return max(torch.Size(evaluator.sizes.shape(n)).numel() for n in region.inputs)


def _unique(values: torch.Tensor, index: int) -> torch.Tensor:
    """Away from 0, so that a product with it shows."""
    if not (values.dtype.is_floating_point or values.dtype.is_complex):
        return values
    if values.dtype.is_complex:
        parts = torch.view_as_real(values)
        return torch.view_as_complex(parts + 0.25 * parts.sign() + index * 1e-3)
    return values + 0.25 * values.sign() + index * 1e-3
