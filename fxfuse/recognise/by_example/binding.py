"""Which tensor of a region is which parameter of an example? Asked of both, not tried in all orders.

1. Shapes and types: the example runs only where they fit (`lazily`).
2. Among tensors of one kind: let all of them hold the same values, and change one. What that does to the result says
   which parameter it is, for in the example that parameter does the same. Where several do the same (a sum of three),
   one of them is told apart by a value of its own, and the others are asked again.

So for n tensors about n² runs say it, where orders are n!. What was found is compared on ordinary numbers of several
magnitudes before it is believed, and proven after that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from fxfuse.recognise.by_example.lazily import Results, Search, results_of

MAX_RUNS = 4096
"""Runs of an example for one region and one choice of its numbers, at most."""
SAME = 1e-9
"""Relative to the largest, how far values in float64 may be apart: the proof looks closer."""

Draw = Callable[[int], list[Tensor]]
"""Gives values of the region's inputs, the same for the same number."""
Runs = Callable[[Sequence[Tensor]], Results]


@dataclass(frozen=True)
class Order:
    """By parameter the input that it is, and by output of the region the result of the example that it is."""

    inputs: tuple[int, ...]
    results: tuple[int, ...]


@dataclass
class Binder:
    """Asks one region and one example, with its numbers given."""

    region: Runs
    example: Callable[..., Any]
    draw: Draw
    nearest: float = float("inf")
    """How far apart the two were at least, where they gave the same shapes."""
    results: int = 0
    """How many results the example gave."""
    ran: bool = False
    raised: Exception | None = None
    exhausted: bool = False
    """Did it end at `MAX_RUNS`?"""
    _left: int = MAX_RUNS
    _drawn: dict[int, list[Tensor]] = field(default_factory=dict)

    def orders(self) -> Iterator[Order]:
        """Every order in which the two may be the same, more likely ones first."""
        inputs = self._values(0)
        keys = [(tuple(t.shape), t.dtype) for t in inputs]
        known = list(dict.fromkeys(keys))
        kinds = [known.index(key) for key in keys]
        first = [kinds.index(kind) for kind in range(len(known))]
        search = Search(self.example, len(inputs), kinds, [inputs[i] for i in first])
        expected = self.region([inputs[first[kind]] for kind in kinds])
        for given, results in search.ways():
            self.ran, self.results = True, len(results)
            for chosen in self._chosen(expected, results):
                yield from self._told_apart(kinds, given, chosen)
            if search.runs > MAX_RUNS:
                self.exhausted = True
                break
        self.ran, self.raised = self.ran or search.ran, search.raised

    def _chosen(self, expected: Results, results: Results) -> Iterator[tuple[int, ...]]:
        """Which results of the example the region's outputs are."""
        for chosen in permutations(range(len(results)), len(expected)):
            error = 0.0
            for value, place in zip(expected, chosen, strict=True):
                if value.shape != results[place].shape:
                    break
                error = max(error, apart(value, results[place]))
            else:
                if error < SAME:
                    yield chosen
                self.nearest = self.nearest if error < SAME else min(self.nearest, error)

    def _told_apart(self, kinds: Sequence[int], given: Sequence[int], chosen: tuple[int, ...]) -> Iterator[Order]:
        """Orders of the inputs, each given to a parameter of its kind.

        A mark is what inputs and parameters have in common that nothing told apart so far; those of one mark hold the
        same values.
        """
        stack = [(list(kinds), list(given))]
        while stack:
            mine, theirs = stack.pop()
            marked = self._refined(mine, theirs, chosen)
            if marked is None:
                continue
            mine, theirs = marked
            shared = next((m for m in sorted(set(mine)) if mine.count(m) > 1), None)
            if shared is None:
                yield Order(tuple(mine.index(mark) for mark in theirs), chosen)
                continue
            fresh = max(mine) + 1
            parameter = theirs.index(shared)
            for i in reversed([i for i, mark in enumerate(mine) if mark == shared]):
                stack.append((_with(mine, i, fresh), _with(theirs, parameter, fresh)))

    def _refined(
        self, mine: list[int], theirs: list[int], chosen: tuple[int, ...]
    ) -> tuple[list[int], list[int]] | None:
        """The marks, each divided by what a change of an input does; None where the two do not do the same."""
        while True:
            values = {mark: self._values(mark)[mine.index(mark)] for mark in set(mine)}
            if not _alike(self.region(_given(mine, values, {})), self._run(_given(theirs, values, {})), chosen):
                return None
            divided = False
            for mark in sorted(set(mine)):
                here = [i for i, m in enumerate(mine) if m == mark]
                if len(here) == 1:
                    continue
                places = [p for p, m in enumerate(theirs) if m == mark]
                other = self._values(-1 - mark)[here[0]]
                effects = [self.region(_given(mine, values, {i: other})) for i in here]
                told: list[tuple[Results, list[int], list[int]]] = []
                for i, effect in zip(here, effects, strict=True):
                    group = next((g for g in told if _alike(effect, g[0], range(len(effect)))), None)
                    if group is None:
                        told.append((effect, [i], []))
                    else:
                        group[1].append(i)
                for place in places:
                    found = self._run(_given(theirs, values, {place: other}))
                    group = next((g for g in told if found is not None and _alike(g[0], found, chosen)), None)
                    if group is None:
                        return None
                    group[2].append(place)
                if any(len(members) != len(own) for _, members, own in told):
                    return None
                for _, members, own in told[1:]:
                    divided = True
                    fresh = max(mine) + 1
                    mine = [fresh if i in members else m for i, m in enumerate(mine)]
                    theirs = [fresh if p in own else m for p, m in enumerate(theirs)]
                if divided:
                    break
            if not divided:
                return mine, theirs

    def _run(self, tensors: Sequence[Tensor]) -> Results | None:
        self._left -= 1
        if self._left < 0:
            self.exhausted = True
            return None
        try:
            with torch.no_grad():
                return results_of(self.example(*tensors))
        except Exception as error:
            self.raised = error
            return None

    def _values(self, number: int) -> list[Tensor]:
        if number not in self._drawn:
            self._drawn[number] = self.draw(number)
        return self._drawn[number]


def _given(marks: Sequence[int], values: dict[int, Tensor], instead: dict[int, Tensor]) -> list[Tensor]:
    return [instead.get(i, values[mark]) for i, mark in enumerate(marks)]


def _with(marks: Sequence[int], place: int, mark: int) -> list[int]:
    return [mark if i == place else m for i, m in enumerate(marks)]


def _alike(expected: Results, results: Results | None, chosen: Sequence[int]) -> bool:
    """Are the region's outputs these results of the example?"""
    if results is None:
        return False
    pairs = [(value, results[place]) for value, place in zip(expected, chosen, strict=True)]
    return all(value.shape == result.shape and apart(value, result) < SAME for value, result in pairs)


def apart(expected: Tensor, actual: Tensor) -> float:
    """How far apart they are, relative to the largest; what is exact to say is said by the proof."""
    if expected.is_complex() or actual.is_complex():
        if not (expected.is_complex() and actual.is_complex()):
            return float("inf")
        expected, actual = torch.view_as_real(expected), torch.view_as_real(actual)
    if expected.numel() == 0:
        return 0.0
    expected, actual = expected.double(), actual.double()
    equal = (expected == actual) | (expected.isnan() & actual.isnan())
    off = torch.where(equal, 0.0, (actual - expected).abs())
    size = torch.where(expected.isfinite(), expected.abs(), 0.0).max().clamp(min=1e-300)
    return float((off / size).nan_to_num(nan=float("inf")).max())
