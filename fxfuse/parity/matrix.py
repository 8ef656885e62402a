"""The matrix that operators are compared over: type × layout × shape × option, as calls with drawn inputs.

calls("attention", "all")       every combination that means anything
calls("attention", "pairs")     the fewest (about) in which every two values of two axes meet
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import torch

from fxfuse.errors import FxfuseError
from fxfuse.ops.calls import Call, Draw, Matrix
from fxfuse.ops.folders import parts

Sample = Literal["pairs", "all"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def matrices() -> dict[str, Matrix]:
    """By the operator's name: what the `parity.py` of the operators' folders say."""
    return {op: matrix for module in parts("parity") for op, matrix in module.MATRICES.items()}


def matrix_of(op: str) -> Matrix:
    """One operator's matrix.

    Raises:
        FxfuseError: there is no such operator.
    """
    if op not in matrices():
        raise FxfuseError(f"no operator {op!r}", where="parity", hint="one of " + ", ".join(matrices()))
    return matrices()[op]


def operators() -> tuple[str, ...]:
    """The operators that have a matrix."""
    return tuple(matrices())


def calls(op: str, sample: Sample = "pairs") -> Iterator[Call]:
    """The calls of one operator's matrix.

    Raises:
        FxfuseError: there is no such operator.
    """
    matrix = matrix_of(op)
    axes = {"dtype": DTYPES, **matrix.axes}
    points: list[tuple[Any, ...]] = list(itertools.product(*axes.values()))
    # As the sizes of `pairs` depend on the order, the order is always the same.
    random.Random(0).shuffle(points)
    met: set[tuple[int, Any, int, Any]] = set()
    for number, point in enumerate(points):
        pairs = {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(enumerate(map(str, point)), 2)}
        if sample == "pairs" and pairs <= met:
            continue
        values = dict(zip(axes, point, strict=True))
        call = matrix.build(**values, draw=Draw(number, values["dtype"]))
        if call is not None:
            met |= pairs
            yield call
