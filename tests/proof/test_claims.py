"""Claims about positions: made where they hold at every size, and not on near misses."""

from __future__ import annotations

import pytest
import torch

from fxfuse.proof.positions.claims import causal, counts_up, equal_terms, one_number, said_of_causal, triangle
from fxfuse.proof.positions.decide import Fails, Holds, Undecided
from tests.proof.reading import Read, export

I = torch.arange  # noqa: E741


def read(function, **constants):
    made = Read(export(function, **constants))
    return made, made.reader, made.outputs[0]


def holds_causal(function, way, **constants):
    _, reader, node = read(function, **constants)
    row, column = reader.place("query", node.meta["val"].shape[0]), reader.place("key", node.meta["val"].shape[0])
    size = node.meta["val"].shape[0]
    verdict = causal(reader, [(node, (row, column), way)], row, column, (size, size))
    return verdict, said_of_causal(verdict, row, column, reader.size(size))


def keep(change):
    return lambda S, *t: change(I(S)[:, None], I(S), S, *t)


def test_causal_whichever_way_it_is_said() -> None:
    lower = torch.ones(64, 64, dtype=torch.bool).tril()
    assert isinstance(holds_causal(keep(lambda i, j, S: j <= i), True)[0], Holds)
    assert isinstance(holds_causal(keep(lambda i, j, S: j > i), False)[0], Holds)
    assert isinstance(holds_causal(lambda S: torch.full((S, S), float("-inf")).triu(1), 1.0)[0], Holds)
    assert isinstance(holds_causal(lambda S: torch.full((S, S), -1e9).triu(1), 1.0)[0], Holds)
    assert isinstance(holds_causal(lambda S, t: t[:S, :S], True, t=lower)[0], Holds)


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        (lambda i, j, S: (j <= i) & (i - j < 5000), "at length 5001 query 5000 does not see key 0"),
        (lambda i, j, S: (j <= i) | (j < S // 70), "at length 140 query 0 sees key 1"),
        (lambda i, j, S: j < i, "query 0 does not see key 0"),
        (lambda i, j, S: j <= i + 1, "at length 2 query 0 sees key 1"),
        (lambda i, j, S: (j <= i) & (i // 1000 == j // 1000), "at length 1001 query 1000 does not see key 0"),
    ],
)
def test_where_it_is_not_is_said(condition, said) -> None:
    verdict, why = holds_causal(keep(condition), True)
    assert isinstance(verdict, Fails)
    assert said in why, why


def test_a_hole_in_the_tail_of_a_table_is_seen() -> None:
    table = torch.ones(64, 64, dtype=torch.bool).tril()
    table[60:, 3] = False
    assert not isinstance(holds_causal(lambda S, t: t[:S, :S], True, t=table)[0], Holds)


def test_a_shallow_fill_hides_nothing() -> None:
    for number in (-1e3, -1e4, -1e7):
        assert not isinstance(holds_causal(lambda S, n=number: torch.full((S, S), n).triu(1), 1.0)[0], Holds)
    assert not isinstance(holds_causal(lambda S: torch.full((S, S), -1e9).triu(1), -1.0)[0], Holds)


def test_two_numbers_below_and_above_the_diagonal() -> None:
    def verdict(function, low, high):
        _, reader, node = read(function)
        index = reader.index(node)
        return triangle(reader, node, index, index[0], index[1], low, high)

    assert isinstance(verdict(lambda S: torch.ones(S, S).tril(), 1.0, 0.0), Holds)
    assert not isinstance(verdict(lambda S: torch.ones(S, S).tril(), 1.0, -1.0), Holds)
    assert not isinstance(verdict(lambda S: torch.ones(S, S).tril(-1), 1.0, 0.0), Holds)
    assert not isinstance(verdict(lambda S: torch.ones(S, S).tril().triu(-900), 1.0, 0.0), Holds)


ONE = {
    "ones": (lambda S: torch.ones(S, 3), True),
    "a table of one": (lambda S, t: t[I(S) % 8], True),
    "a table of one but the last": (lambda S, u: u[I(S) % 8], False),
    "the length": (lambda S: torch.full((S,), S), False),
    "positions over many": (lambda S: I(S) // 100_000, False),
    "a remainder by one": (lambda S: I(S) % 1 + 3, True),
    "what is drawn": (lambda S: torch.rand(S), False),
}


@pytest.mark.parametrize("case", ONE)
def test_one_number(case) -> None:
    function, one = ONE[case]
    tables = {"t": torch.full((8,), 2.5), "u": torch.tensor([2.5] * 7 + [2.0])}
    used = {n: t for n, t in tables.items() if n in function.__code__.co_varnames}
    _, reader, node = read(function, **used)
    assert (one_number(reader, node) is not None) == one


def test_one_number_after_a_shorter_table() -> None:
    """Its indices are its own: the first two of four are one number, all four are not."""
    made, reader, _ = read(
        lambda S, a, b: [a + 0, b + 0], a=torch.tensor([7.0, 7.0]), b=torch.tensor([3.0, 3.0, 3.0, 4.0])
    )
    assert one_number(reader, made.outputs[0]) is not None
    assert one_number(reader, made.outputs[1]) is None


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda S: I(S), Holds),
        (lambda S: torch.ones(S, dtype=torch.int64).cumsum(0) - 1, Holds),
        (lambda S: I(S).flip(0).flip(0), Holds),
        (lambda S: I(S).clamp(max=4000), Fails),
        (lambda S: I(S) % 4000, Fails),
        (lambda S: I(S).to(torch.int8).long(), Fails),
        (lambda S: I(S).to(torch.bfloat16).long(), Undecided),
        (lambda S: I(S) + S // 5000, Fails),
    ],
)
def test_counts_up(function, expected) -> None:
    _, reader, node = read(function)
    assert isinstance(counts_up(reader, node), expected)


def columns(function, width, **constants):
    """The elements of column p and of column p + width/2, for each p of the first half."""
    _, reader, node = read(function, **constants)
    t = reader.terms
    pair = t.variable("pair", 0, width // 2 - 1)
    place = reader.place("axis 0", node.meta["val"].shape[0])
    return reader, *(reader.read(node, (place, t.add(pair, t.number(n)))) for n in (0, width // 2))


def test_halves_are_equal_only_where_every_row_is() -> None:
    half = torch.rand(64, 4)
    table = torch.cat([half, half], 1)
    assert equal_terms(*columns(lambda S, t: t[:S], 8, t=table), "pair")
    for row, column in ((60, 5), (63, 7), (0, 4)):
        other = table.clone()
        other[row, column] += 1e-6
        assert not equal_terms(*columns(lambda S, t: t[:S], 8, t=other), "pair")


def test_halves_that_are_computed() -> None:
    frequencies = torch.tensor([1.0, 0.5, 0.25, 0.125])

    def halves(second):
        def table(length, f):
            angle = I(length)[:, None] * f
            return torch.cat([angle, second(angle, I(length)[:, None])], 1).cos()

        return columns(table, 8, f=frequencies)

    assert equal_terms(*halves(lambda a, i: a), "pair")
    assert not equal_terms(*halves(lambda a, i: a * 2), "pair")
    assert not equal_terms(*halves(lambda a, i: torch.where(i < 4000, a, a / 2)), "pair")
