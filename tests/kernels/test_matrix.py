"""The parity matrix, without a GPU in Triton's interpreter: a sample of it, and with ``--slow`` the whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from fxfuse import kernels
from fxfuse.ops.calls import Call
from fxfuse.parity.cell import Cell
from fxfuse.parity.matrix import calls, operators
from fxfuse.parity.operators import cells
from tests.kernels.device import DEVICE

PARTS = 12
"""Of each operator's whole matrix, so that it spreads over the workers."""

QUICK = {"rms_norm": 24, "rotary_embedding": 20, "attention": 12, "attention_with_present": 4, "tensor_scatter": 24}
"""How many calls of each operator the default run makes, gradients included."""

FORWARD_ONLY = {"attention": 80, "attention_with_present": 15}
"""And how many more without: the backward kernels are what takes long."""


def failures(found: Iterator[Cell]) -> list[str]:
    """Whatever is wrong, and every kernel that did not run."""
    wrong = [cell for cell in found if not cell.passed or (cell.implementation == "triton" and not cell.ran)]
    return [f"{cell}: {cell.reason} ({cell.ulp} ulp)" for cell in wrong]


def everything(these: Iterator[Call], backward: bool = True) -> Iterator[Cell]:
    return itertools.chain.from_iterable(cells(call.on(DEVICE), backward=backward) for call in these)


def test_every_operator_with_a_kernel_has_a_matrix() -> None:
    assert set(operators()) == set(kernels.names())


@pytest.mark.parametrize("op", QUICK)
def test_sample(op: str) -> None:
    assert not failures(everything(itertools.islice(calls(op, "pairs"), QUICK[op])))


@pytest.mark.parametrize("op", FORWARD_ONLY)
def test_forward_sample(op: str) -> None:
    more = itertools.islice(calls(op, "pairs"), QUICK[op], QUICK[op] + FORWARD_ONLY[op])
    assert not failures(everything(more, backward=False))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("op", QUICK)
def test_whole(op: str, part: int) -> None:
    # Gradients of every third call: of all of them they would take three times as long as all the rest.
    for number, call in itertools.islice(enumerate(calls(op, "all")), part, None, PARTS):
        assert not failures(cells(call.on(DEVICE), backward=number // PARTS % 3 == 0))
