"""What moves elements, and arithmetic on positions: read for all lengths as it is computed."""

from __future__ import annotations

import math

import pytest
import torch

from tests.proof.reading import check

I = torch.arange  # noqa: E741

TABLE = {
    "three of one": torch.tensor([5, 5, 5, 3]),
    "spread": torch.tensor([1, 2, 3, 9]),
    "odd": I(3, 19, 2),
    "triangle": torch.ones(8, 8).tril(),
    "wide": torch.full((8, 8), -math.inf).triu(3),
    "hole": torch.ones(8, 8).tril().index_fill(1, torch.tensor(6), 0.0),
}


def apart(length):
    return I(length)[:, None] - I(length)


READ = {
    "triangle": lambda S: torch.ones(S, S, dtype=torch.bool).tril(),
    "triangle below the diagonal": lambda S: [
        I(S).expand(S, S).tril(-1),
        I(S).expand(S, S).triu(2),
        torch.ones(2, S, S).tril(1),
    ],
    "triangle by half the length": lambda S: torch.ones(S, S).triu(-(S // 2)),
    "counting from, down and in steps": lambda S: [I(3, S + 3), I(S, 0, -1), I(0, S, 3)],
    "distance": lambda S: apart(S).abs(),
    "quotients of quotients": lambda S: [I(S) // 16 // 16, (I(S) + 5) // 4 * 4, (I(S) * 6 + 3) // 4],
    "quotients of what is below 0": lambda S: [(3 - I(S)) // 4, (I(S) * -3 - 1) // 6 * 2 % 5, (I(S) - 5) >> 1],
    "remainders round down": lambda S: [(I(S) - 5) % 3, torch.remainder(I(S) - 5, 3), (I(S) - 5) & 7],
    "of a size": lambda S: [I(S) * (S // 2), I(S) + (S % 7) * (S // 3), I(S) + (-S) // 3, I(S) + (5 - S) % 4],
    "the smaller of a size and a number": lambda S: I(S) < torch.sym_min(S, 64),
    "slices": lambda S: [I(S)[-3:], I(S)[2:], I(S)[:-1], I(S)[::2], I(S)[-5:-2], I(S)[1::3]],
    "a slice beyond the end": lambda S: I(S)[-1000:],
    "a grid": lambda S: [
        *torch.meshgrid(I(S), I(4), indexing="ij"),
        *torch.meshgrid(I(3), I(S), indexing="xy"),
        *torch.meshgrid(I(2), I(S), I(3), indexing="xy"),
    ],
    "what indices below 0 pick": lambda S: [I(S)[I(S) - 1], (I(S) * 10)[apart(S)]],
    "picked": lambda S: [I(S).index_select(0, I(S).flip(0)), I(S * 3).view(S, 3).gather(1, (I(S) % 3)[:, None])],
    "picked by a row and a column": lambda S: apart(S)[I(S)[:, None], I(S).flip(0)],
    "picked after a slice": lambda S: apart(S)[None][:, I(S) // 2, :][0],
    "gathered in fewer places": lambda S: (I(S)[:, None] * 4 + I(4)).gather(0, torch.tensor([[0, 0]])),
    "of the last": lambda S: [(I(S)[:, None] * 4 + I(4))[:, -1], (I(S)[:, None] * 4 + I(4)).select(1, -2)],
    "rolled": lambda S: I(12).view(3, 4).roll((1, -2), (0, 1)),
    "repeated": lambda S: [I(3).repeat(2), I(S)[:, None].repeat(1, 3), I(6).view(2, 3).tile(2, 2)],
    "each repeated": lambda S: [I(4).repeat_interleave(3, dim=0), I(S).repeat_interleave(2, dim=0)],
    "viewed": lambda S: [I(S * 2).view(2, S), I(S * 6).view(S, 6).unflatten(1, (2, 3)).flatten(0, 1)],
    "viewed and turned": lambda S: I(S * 6).view(6, S).view(2, 3, S).permute(2, 0, 1).reshape(S, 6),
    "axes moved": lambda S: [
        (I(S)[:, None, None] * 6 + I(2)[:, None] * 3 + I(3)).movedim(a, b) for a, b in ((0, 2), (2, 0), (-1, -2))
    ],
    "axes turned": lambda S: (I(S)[:, None, None] * 6 + I(2)[:, None] * 3 + I(3)).permute(2, 0, -2),
    "all axes turned": lambda S: (I(S)[:, None, None] * 6 + I(2)[:, None] * 3 + I(3)).T,
    "axes of one": lambda S: [I(S)[None, :, None].squeeze(0).squeeze(-1), I(S)[None, :, None].squeeze()],
    "joined": lambda S: [
        torch.cat([I(S), I(S).flip(0), torch.zeros(3)], 0),
        torch.cat([I(S)[:0], I(S)]),
        torch.stack([I(S), -I(S)], -1),
    ],
    "split": lambda S: [*(I(S)[:, None] * 5 + I(5)).chunk(3, 1), *(I(S)[:, None] * 5 + I(5)).split([1, 4], -1)],
    "split in two": lambda S: [*(I(S)[:, None] * 5 + I(5)).tensor_split(2, 1), *(I(S)[:, None] * 2 + I(2)).unbind(-1)],
    "outer products": lambda S: [
        torch.outer(I(S), I(S)),
        torch.einsum("i,j->ij", I(S), I(S)),
        I(S)[:, None] @ I(S)[None],
    ],
    "counted by adding": lambda S: [
        torch.ones(S, dtype=torch.int64).cumsum(0) - 1,
        torch.ones(S, S, dtype=torch.bool).cumsum(-1),
    ],
    "steps of blocks": lambda S: [torch.diff(I(S) // 4, prepend=torch.full((1,), n)) for n in (-1, 0, 3)],
    "vmap": lambda S: torch.vmap(torch.vmap(lambda i, j: (i >= j) & (i - j < 5), (None, 0)), (0, None))(I(S), I(S)),
    "vmap three deep": lambda S: torch.vmap(
        lambda h: torch.vmap(lambda i: torch.vmap(lambda j: (j <= i) | (j < h))(I(S)))(I(S))
    )(I(3)),
    "vmap over a row": lambda S: torch.vmap(lambda row: row * 2 + I(S))(I(S)),
    "identity": lambda S: [torch.eye(S), torch.eye(S, 3), torch.eye(S, dtype=torch.bool)],
    "chosen": lambda S: [
        torch.where(I(S) > 2, 1, 0.5),
        torch.where(I(S) > 2, True, I(S) > 1),
        I(S).masked_fill(I(S) > 3, 9),
    ],
    "bounds the wrong way round": lambda S: I(S).clamp(5, 3),
    "compared with fractions": lambda S: [I(S) < 2.5, I(S) == 2.5, I(S) >= -0.5, I(S) < 2**40],
    "filled far down": lambda S: [
        torch.full((S, S), torch.finfo(torch.float32).min).triu(1),
        torch.zeros(S, S).masked_fill(torch.ones(S, S).triu(1) > 0, -math.inf),
    ],
    "far down, twice": lambda S: torch.full((S, S), torch.finfo(torch.float32).min).triu(1) * 2,
    "by arithmetic": lambda S: [(1 - torch.ones(S, S).tril()) * -1e9, torch.ones(S, S).tril().log()],
    "both signs of nothing": lambda S: [torch.zeros(S) * -1, (I(S) * -1.0) * -1.0],
}
UNREAD = {
    "minus nothing has a sign": lambda S: torch.full((S,), -0.0).reciprocal(),
    "and so has a quotient": lambda S: 1 / -torch.zeros(S),
    "what is not a number equals nothing": lambda S: (z := torch.full((S,), math.nan)) == z,
    "nor does what may be none": lambda S: (z := (I(S) - 5.0).log()) == z,
    "infinity less infinity": lambda S: torch.full((S, S), -math.inf).triu(1) + torch.full((S, S), math.inf).triu(1),
    "infinity times nothing": lambda S: torch.full((S, S), -math.inf) * torch.ones(S, S).triu(1),
    "truncated": lambda S: torch.div(I(S) - 5, 3, rounding_mode="trunc"),
    "with the sign of the dividend": lambda S: torch.fmod(I(S) - 5, 3),
    "by what is below 0": lambda S: (I(S) - 5) % -3,
    "a factor beside a difference": lambda S: torch.sub(I(S)[:, None], I(S), alpha=2),
    "a reciprocal, rounded down": lambda S: (I(S) * (1 / 3)).floor(),
    "bits as another type": lambda S: I(S).float().view(torch.int32),
    "sums along one axis of sums along another": lambda S: (I(S)[:, None] - I(S)).cumsum(1).cumsum(0),
    "differences of fractions": lambda S: torch.diff(torch.where(I(S) > 0, 0.5, 0.0), prepend=torch.zeros(1)),
    "differences of truths": lambda S: torch.diff(I(S) > 3, prepend=torch.zeros(1, dtype=torch.bool)).long(),
}


@pytest.mark.parametrize("case", READ)
def test_is_read_as_it_is_computed(case: str) -> None:
    assert set(check(READ[case])) == {"read"}


@pytest.mark.parametrize("case", UNREAD)
def test_nothing_is_said_of(case: str) -> None:
    assert "read" not in check(UNREAD[case])


@pytest.mark.parametrize("name", TABLE)
def test_a_table_is_met_whole(name: str) -> None:
    """Its last row counts as much as its first."""
    table = TABLE[name]
    row = I(table.shape[0])

    def picked(length, table):
        place = I(length) % len(row)
        return table[place] if table.dim() == 1 else table[place][:, place]

    assert check(picked, table=table) == ["read"]


@pytest.mark.parametrize("size", [3, 4])
def test_a_table_of_which_a_part_is_read_is_met_there(size: int) -> None:
    """The first three of four are one number."""
    assert check(lambda S, t: t[I(S) % size], table=TABLE["three of one"]) == ["read"]


def test_an_index_below_0_of_a_table_counts_from_its_end() -> None:
    assert check(lambda S, t: t[(I(S) % 4) - 2], table=TABLE["spread"]) == ["read"]


def test_two_tensors_of_unlike_sizes_have_unlike_indices() -> None:
    """One that is read first does not bound the indices of the next."""
    tables = {"short": torch.tensor([7, 8]), "long": torch.tensor([3, 3, 3, 4])}
    assert check(lambda S, short, long: [short[:2].clone(), long[:4].clone()], **tables) == ["read", "read"]
