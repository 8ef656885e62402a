"""Which features a rotation turns together, and where it leaves them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fxfuse.recognise.answers import Reason

Places = Literal["halves", "neighbours"]


@dataclass(frozen=True)
class Pairing:
    """Feature `first[i]` and `second[i]` of x become feature `out_first[i]` and `out_second[i]` of y."""

    taken: Places
    """Where the two features of a pair are in x."""
    left: Places
    """Where they are in y. It may be elsewhere: DeepSeek's code takes neighbours and leaves halves."""
    pairs: int

    @property
    def interleaved(self) -> bool:
        """What ONNX calls it: the pairing in x."""
        return self.taken == "neighbours"

    @property
    def first(self) -> list[int]:
        return _members(self.taken, self.pairs)[0]

    @property
    def second(self) -> list[int]:
        return _members(self.taken, self.pairs)[1]

    @property
    def out_first(self) -> list[int]:
        return _members(self.left, self.pairs)[0]

    @property
    def out_second(self) -> list[int]:
        return _members(self.left, self.pairs)[1]

    def arrange(self, y: torch.Tensor) -> torch.Tensor:
        """Put the features of a rotated ``[..., 2 * pairs]``, which stand where x has them, where the region leaves
        them."""
        if self.taken == self.left:
            return y
        inner = (self.pairs, 2) if self.taken == "neighbours" else (2, self.pairs)
        return torch.unflatten(y, -1, inner).transpose(-1, -2).flatten(-2)

    def joined(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Take the first feature of each pair from `first` and the second from `second`; both stand as the region
        leaves them."""
        count = 2 * self.pairs
        if self.left == "halves":
            parts = [first[..., : self.pairs], second[..., self.pairs : count]]
        else:
            one, two = (torch.unflatten(t[..., :count], -1, (self.pairs, 2)) for t in (first, second))
            parts = [torch.stack([one[..., 0], two[..., 1]], -1).flatten(-2)]
        return torch.cat([*parts, first[..., count:]] if first.shape[-1] > count else parts, -1)


def pairing_of(reaches: torch.Tensor) -> Pairing | Reason:
    """The pairing that ``reaches [D out, D in]`` (which feature reaches which) shows."""
    dim = reaches.shape[-1]
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
    kinds: tuple[Places, ...] = ("neighbours", "halves") if count == 2 else ("halves", "neighbours")
    for left in kinds:
        for taken in (left, *(k for k in kinds if k != left)):
            pairing = Pairing(taken, left, count // 2)
            if count % 2 == 0 and _shows(pairing, rows):
                if left != taken and count < dim:
                    return Reason("a rotation whose result is permuted, of a part of the features", 2)
                return pairing
    if any(d not in rows[d] for d in rotated):
        return Reason("a rotation whose result is permuted (its rows and columns pair differently)", 2)
    return Reason("a rotation, but its pairs are neither halves nor neighbours", 2)


def _shows(pairing: Pairing, rows: list[list[int]]) -> bool:
    taken = zip(pairing.first, pairing.second, strict=True)
    left = zip(pairing.out_first, pairing.out_second, strict=True)
    return all(rows[c] == rows[d] == [a, b] for (a, b), (c, d) in zip(taken, left, strict=True))


def _members(places: Places, pairs: int) -> tuple[list[int], list[int]]:
    if places == "halves":
        return list(range(pairs)), list(range(pairs, 2 * pairs))
    return list(range(0, 2 * pairs, 2)), list(range(1, 2 * pairs, 2))
