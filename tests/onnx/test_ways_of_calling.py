"""However a model is asked for, it is the same: doors, styles of dynamic dimensions, sizes of the sample, types."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fxfuse import FxfuseWarning
from tests.onnx.ways import DOORS, MODELS, STYLES, D, build

WAYS = st.tuples(
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(sorted(STYLES)),
    st.sampled_from([1, 2, 3, 5]),
    st.sampled_from([1, 2, 5, 8, 16]),
    st.sampled_from(["float32", "float32", "float16"]),
)
OTHER = [(1, 5), (3, 7), (2, 8), (4, 4), (1, 2)]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2}
ASKING = ("padded", "one apart", "square", "distances")
"""Models that ask of their sizes. torch.export keeps the answers, and the program refuses other sizes."""
FEW = settings(
    max_examples=6,
    deadline=None,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)


def holds(door: str, way: tuple[Any, ...]) -> None:
    """The door gives what eager gives, at the sample's sizes and at others, and fuses what there is."""
    name = way[0]
    model, (x,), *_ = build(*way)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FxfuseWarning)  # all are as dynamic as they are asked to be
        run, counts = DOORS[door](way)
    if counts:
        assert {k: v for k, v in counts.items() if v} == MODELS[name][1]
    close = TOLERANCE[x.dtype]
    others = OTHER if door != "prepass" else [] if name in ASKING else [(3, 6), (2, 7)]
    for size in [tuple(x.shape[:2]), *others]:
        x = torch.randn(*size, D).to(x.dtype)
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x), rtol=close, atol=close)


@pytest.mark.parametrize("door", DOORS)
def test_the_doors_agree(door: str) -> None:
    @seed(sorted(DOORS).index(door))
    @FEW
    @given(WAYS)
    def held(way: tuple[Any, ...]) -> None:
        holds(door, way)

    held()


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
@settings(FEW, max_examples=100)
@given(way=WAYS)
def test_more_ways(door: str, way: tuple[Any, ...]) -> None:
    holds(door, way)
