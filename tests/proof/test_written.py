"""Tensors that are written in place: an element is what was written to it last, before it is read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, bfloat16, int8

from tests.proof.reading import check

I = torch.arange  # noqa: E741


def after(*steps, start=lambda length: torch.zeros(length, length)):
    """The tensor after these writes."""

    def made(length) -> Tensor:
        m = start(length)
        for step in steps:
            step(m, length)
        return m.clone()

    return made


def lower(length) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def row(length) -> Tensor:
    return I(length)


def without_gradients(length):
    m = torch.zeros(length, length)
    with torch.no_grad():
        m[0].fill_(3)
        column = m[:, 1]
    column.add_(2)
    return m + 0


def before_and_after(length):
    m = torch.zeros(length, length)
    first = m + 1
    m.fill_(2)
    return [first, m + 1]


def through_a_view_of_before(length):
    m = torch.zeros(length, length)
    view = m.transpose(0, 1)
    view[0].fill_(3)
    m[1].copy_(view[0])
    return m + 0


def a_view_made_before(length):
    m = I(length)
    wide = m.expand(length, length)
    m.add_(1)
    return wide + 0


def a_copy_made_before(length):
    m = I(length)
    copy, same = m.clone(), m.to(torch.int64)
    copy.add_(1)
    same.mul_(2)
    return [m + 0, copy + 0]


def the_result_written_on(length):
    """A write gives back what it wrote to; that is not written twice."""
    m = torch.zeros(length, length)
    m[0].add_(m[1].add_(1))
    return m + 0


def twice_in_a_row(length):
    m = torch.zeros(length)
    return m.add_(1).add_(1).mul_(3) + 0


READ = {
    "a row": after(lambda m, S: m[0].fill_(5)),
    "the last row but two": after(lambda m, S: m[-3].fill_(1)),
    "a row counted by the length": after(lambda m, S: m[S - 3].fill_(1)),
    "the middle": after(lambda m, S: m[S // 2 :].fill_(1), lambda m, S: m[:, S // 2].add_(2)),
    "all": after(lambda m, S: m.fill_(0.1)),
    "a tensor of one": after(lambda m, S: m.fill_(torch.tensor(3.0))),
    "rows, columns, a row": after(
        lambda m, S: m[2:4].add_(1), lambda m, S: m[:, 1:3].mul_(5), lambda m, S: m[1].add_(3)
    ),
    "a slice of a slice": after(lambda m, S: m[1:][1:][0].add_(5), lambda m, S: m[:, 2:][1:3].add_(5)),
    "by index": after(lambda m, S: m.__setitem__((slice(None), 0), I(S).float()), lambda m, S: m.__setitem__(0, 7.0)),
    "a prefix": after(lambda m, S: m[:2].fill_(True), lambda m, S: m[:, -1].fill_(False), start=lower),
    "or": after(lambda m, S: m.logical_or_(I(S) < 2), start=lower),
    "filled and cleared": after(
        lambda m, S: m.masked_fill_(torch.ones(S, S).triu(1) > 0, -math.inf), lambda m, S: m[0].zero_()
    ),
    "triangle of itself": after(
        lambda m, S: m.copy_(I(S).expand(S, S)), lambda m, S: m.tril_(-1), lambda m, S: m.triu_(-3)
    ),
    "shifted by one": after(lambda m, S: m[1:].copy_(m[:-1].clone()), start=row),
    "bounded": after(lambda m, S: m.clamp_(max=5), start=row),
    "in a narrow type": after(lambda m, S: m.add_(100), start=lambda S: I(S, dtype=int8)),
    "row by row": after(
        *(lambda m, S, r=r: m[r].add_(r) for r in range(3)),
        lambda m, S: m[1:].mul_(2),
        start=lambda S: torch.zeros(3, S),
    ),
    "a view of it before": through_a_view_of_before,
    "a view made before": a_view_made_before,
    "a copy made before": a_copy_made_before,
    "the result written on": the_result_written_on,
    "twice in a row": twice_in_a_row,
}
NOT_WRONG = {
    "without gradients": without_gradients,
    "turned": after(lambda m, S: m.T[0].add_(5)),
    "before and after": before_and_after,
    "the length in bfloat16": after(lambda m, S: m.fill_(S), start=lambda S: torch.zeros(S, dtype=bfloat16)),
    "positions into bfloat16": after(lambda m, S: m.copy_(I(S)), start=lambda S: torch.zeros(S, dtype=bfloat16)),
    "positions into int8": after(lambda m, S: m.copy_(I(S)), start=lambda S: torch.zeros(S, dtype=int8)),
    "times positions, in bfloat16": after(lambda m, S: m.mul_(I(S)), start=lambda S: torch.ones(S, dtype=bfloat16)),
    "every other": after(lambda m, S: m[::2].fill_(1)),
    "the last two": after(lambda m, S: m[-2:].fill_(1)),
    "the diagonal": after(lambda m, S: m.diagonal().fill_(1)),
    "through a view": after(lambda m, S: m.view(-1, 1).add_(1), start=row),
    "through what may be a copy": after(lambda m, S: m.reshape(S, 1).add_(1), start=row),
    "what is copied by a cast": after(lambda m, S: m.to(torch.int32).add_(1), start=row),
    "what is the same by a cast": after(lambda m, S: m.to(torch.int64).add_(1), start=row),
    "contiguous already": after(lambda m, S: m.contiguous().add_(1), start=row),
    "a copy by indices": after(lambda m, S: m[I(S), I(S)].fill_(1)),
    "rows by their index": after(lambda m, S: m.index_fill_(0, torch.tensor([0]), 1)),
    "where it is large": after(lambda m, S: m.__setitem__(I(S) > 3, 1), start=row),
    "pieces": after(
        lambda m, S: [p.add_(n + 1) for n, p in enumerate(m.chunk(2, -1))], start=lambda S: torch.zeros(S, 4)
    ),
    "narrowed": after(lambda m, S: m.narrow(1, 1, 2).add_(5), start=lambda S: torch.zeros(S, 4)),
    "many times over": after(lambda m, S: m.expand(3, S)[0].add_(1), start=lambda S: torch.zeros(1, S)),
    "turned round onto itself": after(lambda m, S: m.copy_(m.flip(0)), start=row),
    "compared": after(lambda m, S: m.le_(3), lambda m, S: m.add_(1), start=row),
    "a factor": after(lambda m, S: m.add_(3, alpha=2), start=row),
    "quotients": after(lambda m, S: m.floor_divide_(3), lambda m, S: m.remainder_(2), start=row),
    "beyond the end": after(lambda m, S: m[10:].fill_(1), start=row),
}


@pytest.mark.parametrize("case", READ)
def test_what_was_written_last_is_read(case: str) -> None:
    assert set(check(READ[case])) == {"read"}


@pytest.mark.parametrize("case", NOT_WRONG)
def test_what_is_read_is_never_wrong(case: str) -> None:
    """Read or not: `check` compares what is."""
    assert check(NOT_WRONG[case])
