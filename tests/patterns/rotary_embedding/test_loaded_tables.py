"""Tables of full width that a checkpoint may replace: right whatever is loaded, rotated once where they are frozen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxfuse
import fxfuse.onnx

ROWS, WIDTH = 32, 8


def half(rows: int = ROWS) -> Tensor:
    return torch.outer(torch.arange(float(rows)), 100 ** (-torch.arange(WIDTH // 2) / (WIDTH / 2)))


class Rotated(nn.Module):
    def __init__(self, neighbours: bool, picked: bool, passed: int) -> None:
        super().__init__()
        self.neighbours, self.picked, self.passed = neighbours, picked, passed
        angles = half().repeat_interleave(2, -1) if neighbours else torch.cat([half()] * 2, -1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        cos, sin = (t[at][:, None] if self.picked else t[: x.shape[2]] for t in (self.cos, self.sin))
        x, rest = x[..., :WIDTH], x[..., WIDTH:]
        if self.neighbours:
            swapped = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        else:
            swapped = torch.cat([-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]], -1)
        y = x * cos + swapped * sin
        return torch.cat([y, rest], -1) if self.passed else y


def inputs(batch: int, length: int, passed: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, length, WIDTH + passed), torch.randint(0, ROWS, (batch, length))


AXES = ({0: Dim.AUTO, 2: Dim.AUTO}, {0: Dim.AUTO, 1: Dim.AUTO})


@pytest.mark.parametrize("neighbours", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("picked", [False, True], ids=["from 0 on", "by position"])
@pytest.mark.parametrize("passed", [0, 4])
def test_what_is_loaded_later_rotates(neighbours: bool, picked: bool, passed: int) -> None:
    model = Rotated(neighbours, picked, passed).eval()
    program = torch.export.export(model, inputs(2, 5, passed), dynamic_shapes=AXES)
    made = fxfuse.fuse(program)
    (entry,) = fxfuse.report(made)
    assert entry.status == "fused" and "'cos', 'sin' (frozen=True" in str(entry.evidence)
    module = made.module()
    for state in (model.state_dict(), {k: torch.randn(ROWS, WIDTH) for k in ("cos", "sin")}):
        model.load_state_dict(state)
        module.load_state_dict(state)
        args = inputs(3, 7, passed)
        torch.testing.assert_close(module(*args), model(*args))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_rounds_as_the_model(dtype: torch.dtype) -> None:
    model = Rotated(False, False, 0).eval().to(dtype)
    x, at = inputs(2, 5, 0)
    made = fxfuse.fuse(torch.export.export(model, (x.to(dtype), at), dynamic_shapes=AXES))
    assert fxfuse.report(made).counts == {"RotaryEmbedding": 1}
    torch.testing.assert_close(made.module()(x.to(dtype), at), model(x.to(dtype), at))


def test_frozen_tables_rotate_once() -> None:
    model = Rotated(False, False, 0).eval()
    program = torch.export.export(model, inputs(2, 5, 0), dynamic_shapes=AXES)

    def rotations(frozen: bool) -> int:
        graph = fxfuse.fuse(program, frozen=frozen).graph
        return sum(n.target is torch.ops.fxfuse.rotary_embedding.default for n in graph.nodes)

    assert (rotations(True), rotations(False)) == (1, 2)
    exported = fxfuse.onnx.export(program)
    assert [n.op_type for n in exported.model.graph].count("RotaryEmbedding") == 1
    made = fxfuse.fuse(program)
    fxfuse.verify(program, made)
    args = inputs(2, 6, 0)
    torch.testing.assert_close(fxfuse.unfuse(made).module()(*args), model(*args))


def test_halves_that_differ_are_no_rotation() -> None:
    model = Rotated(False, False, 0)
    model.cos[3, 0] += 1
    made = fxfuse.fuse(torch.export.export(model.eval(), inputs(2, 5, 0), dynamic_shapes=AXES))
    (entry,) = fxfuse.report(made)
    assert entry.status == "near miss" and "angles of the two rows" in str(entry.reason)
