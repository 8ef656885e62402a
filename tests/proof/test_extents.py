"""Sizes that matter: minimum, maximum, floor division and slices that are written are met on both sides, or refused."""

from __future__ import annotations

import pytest
import torch

import fxfuse
from fxfuse.recognise.catalogue import unregister
from tests.proof.kinds import Model, check, drawn, fuse


@pytest.fixture
def centred():
    @fxfuse.pattern(replacement=lambda x: x - x.mean(1, keepdim=True), operator="Centred")
    def from_the_mean(x):
        return x - x.mean(1, keepdim=True)

    yield from_the_mean
    unregister("from_the_mean")


def share(x, count):
    return x - x.sum(1, keepdim=True) / count


# Each with what the report says of it, if it may not be fused.
BOUNDED = {
    "of the first 64": lambda x: x - x[:, :64].mean(1, keepdim=True),
    "of the last 64": lambda x: x - x[:, -64:].mean(1, keepdim=True),
    "of the first 64, narrowed": lambda x: x - x.narrow(1, 0, torch.sym_min(x.shape[1], 64)).mean(1, keepdim=True),
    "over at least 64": lambda x: share(x, torch.sym_max(x.shape[1], 64)),
    "over at most 64": lambda x: share(x, torch.sym_min(x.shape[1], 64)),
    "more by blocks": lambda x: x - x.mean(1, keepdim=True) * (1 + x.shape[1] // 64),
    "from 2 on": lambda x: x - x[:, 2:].mean(1, keepdim=True),
    "over all but the odd one": lambda x: share(x, x.shape[1] // 2 * 2),
}
SAME = {
    "plain": lambda x: x - x.mean(1, keepdim=True),
    "by the length": lambda x: share(x, x.shape[1]),
    "sliced at its own end": lambda x: x - x[:, : x.shape[1]].mean(1, keepdim=True),
}
INPUTS = [drawn(2, n, 3) for n in (2, 5, 63, 64, 65, 130)]


@pytest.mark.parametrize("case", BOUNDED)
def test_a_bound_of_sizes_is_met_on_both_sides(case, centred) -> None:
    made = fuse(Model(BOUNDED[case], {}), [INPUTS[-1]], ((0, 1),), patterns=[centred])
    assert not made.done, made.said
    check(made, [[x] for x in INPUTS])


@pytest.mark.parametrize("case", SAME)
def test_sizes_that_bound_nothing(case, centred) -> None:
    made = fuse(Model(SAME[case], {}), [INPUTS[1]], ((0, 1),), patterns=[centred])
    check(made, [[x] for x in INPUTS])
    assert made.done, made.said


def test_a_bound_that_no_size_reaches(centred) -> None:
    """Captured for 5, torch takes no length beyond 63: there the first 64 are all."""
    made = fuse(Model(BOUNDED["of the first 64"], {}), [INPUTS[1]], ((0, 1),), patterns=[centred])
    assert made.done, made.said
    check(made, [[x] for x in INPUTS])
