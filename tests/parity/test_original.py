"""What the original computes at several sizes; it says where that does not run, and state is put back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

from fxfuse.errors import FxfuseError
from fxfuse.parity.original import original_outputs
from fxfuse.state.lift import lift


class Counted(nn.Module):
    """Counts its calls, and takes up to `most` columns."""

    count: torch.Tensor

    def __init__(self, most: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.most = nn.Embedding(most, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.count * x + self.most(torch.arange(x.shape[1]))[:, 0]


def outputs(model: Counted, x: torch.Tensor) -> list[tuple[int, ...]]:
    program = torch.export.export(model, (x,), dynamic_shapes=({1: Dim.AUTO},))
    cases, results = original_outputs(model, lift(program))
    assert [case.args[0].shape for case in cases] == [y.shape for y, _ in results]
    assert [count.item() for _, count in results] == list(range(1, len(cases) + 1)), "each call goes on from the last"
    return [tuple(case.args[0].shape) for case in cases]


def test_longer_and_where_that_is_too_long_shorter() -> None:
    x = torch.randn(2, 6)
    assert outputs(Counted(9).eval(), x) == [(2, 6), (2, 9)]
    assert outputs(Counted(8).eval(), x) == [(2, 6), (2, 5)]


def test_it_does_not_run_at_all() -> None:
    model = Counted(9).eval()
    program = torch.export.export(model, (torch.randn(2, 6),), dynamic_shapes=({1: Dim.AUTO},))
    model.most.weight = nn.Parameter(torch.zeros(3, 1))
    with pytest.raises(FxfuseError, match=r"the model itself does not run at export shape(.|\n)*2×6"):
        original_outputs(model, lift(program))
    assert model.count.item() == 0
