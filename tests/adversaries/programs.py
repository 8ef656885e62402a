"""What is drawn: a program of some family, and the calls that it is compared on."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from tests.adversaries.attentions import attentions
from tests.adversaries.caches import joins, writes
from tests.adversaries.examples import examples
from tests.adversaries.norms import norms
from tests.adversaries.program import LONGEST, Program, Run
from tests.adversaries.rotations import rotations

FAMILIES: dict[str, st.SearchStrategy[Program]] = {
    "Attention": attentions(),
    "RMSNorm": norms(),
    "RotaryEmbedding": rotations(),
    "KVCache": joins(),
    "TensorScatter": writes(),
    "example": examples(),
}
SHARES = ("Attention", "Attention", "Attention", "RMSNorm", "RMSNorm", "RotaryEmbedding", "KVCache", "TensorScatter",
          "example", "example")  # fmt: skip


def programs(family: str | None = None) -> st.SearchStrategy[Program]:
    return st.sampled_from(SHARES if family is None else [family]).flatmap(FAMILIES.__getitem__)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Run, ...]:
    """An ordinary call, a long one, tiny and large values, and one feature that is far larger than the others."""
    few = Run(length=draw(st.integers(1, 12)), past=draw(st.integers(1, 12)), hidden=draw(st.integers(0, 3)))
    if draw(st.booleans()):
        long = replace(few, batch=2, length=draw(st.integers(200, LONGEST)))
    else:
        long = replace(few, past=draw(st.integers(200, LONGEST)))
        long = replace(long, length=draw(st.integers(100, LONGEST)) if draw(st.booleans()) else few.length)

    def power(low: int, high: int) -> float:
        return float(f"{10 ** (draw(st.integers(10 * low, 10 * high)) / 10):.1e}")

    longest = replace(few, length=draw(st.integers(270, LONGEST)))
    return tuple(
        replace(run, seed=draw(st.integers(0, 99)))
        for run in (
            few,
            longest,
            long,
            replace(few, scale=power(-6, -1)),
            replace(few, scale=power(1, 3)),
            replace(few, scale=power(3, 6)),
            replace(few, scale=power(-2, 2), outlier=power(1, 6)),
        )
    )
