"""Tables of cos and sin in persistent buffers, whose halves are equal only as long as nobody loads others.

`fuse` takes them for equal, and the program checks it whenever it runs; on the way to ONNX they are constants.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxfuse
import fxfuse.onnx

WIDTH = 16
AXES = {0: Dim.AUTO, 2: Dim.AUTO}


class Rotated(nn.Module):
    """`[B, H, S, D]` times tables `[rows, D]`, of the first positions or of positions that are given."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(64.0), 10000 ** (-torch.arange(0, WIDTH, 2) / WIDTH))
        self.register_buffer("cos", torch.cat([angles.cos()] * 2, -1).to(dtype))
        self.register_buffer("sin", torch.cat([angles.sin()] * 2, -1).to(dtype))

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        at = slice(0, x.shape[2]) if positions is None else positions
        a, b = x.chunk(2, -1)
        return x * self.cos[at] + torch.cat([-b, a], -1) * self.sin[at]


def captured(model: nn.Module, positions: bool) -> tuple[torch.export.ExportedProgram, tuple[Tensor, ...]]:
    x = torch.randn(2, 4, 12, WIDTH, dtype=model.cos.dtype)  # type: ignore[arg-type]
    inputs = (x, torch.arange(12)) if positions else (x,)
    shapes = (AXES, {0: Dim.AUTO}) if positions else (AXES,)
    return torch.export.export(model, inputs, dynamic_shapes=shapes), inputs


@pytest.mark.parametrize("positions", [False, True], ids=["first", "positions"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_it_fuses_and_says_what_is_checked(dtype: torch.dtype, positions: bool) -> None:
    model = Rotated(dtype).eval()
    program, inputs = captured(model, positions)
    fused = fxfuse.fuse(program)
    assert fxfuse.report(fused).counts == {"RotaryEmbedding": 1}
    assert "checked whenever it runs: 'cos', 'sin' may be loaded anew" in str(fxfuse.report(fused))
    torch.testing.assert_close(fused.module()(*inputs), model(*inputs))


def test_tables_loaded_later_are_read_and_unequal_halves_raise() -> None:
    model = Rotated().eval()
    program, inputs = captured(model, False)
    fused = fxfuse.fuse(program).module()
    changed = copy.deepcopy(model)
    changed.cos.mul_(3)
    fused.load_state_dict(changed.state_dict())
    torch.testing.assert_close(fused(*inputs), changed(*inputs))
    changed.cos[3, 2] += 1
    fused.load_state_dict(changed.state_dict())
    with pytest.raises(RuntimeError, match="fuse the program again, with what it holds now"):
        fused(*inputs)


def test_the_check_is_made_once_for_all_that_read_the_tables_and_goes_no_further() -> None:
    class Two(Rotated):
        def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
            return super().forward(x) + super().forward(x.flip(1))

    program, inputs = captured(Two().eval(), False)
    fused = fxfuse.fuse(program)
    assert fxfuse.report(fused).counts == {"RotaryEmbedding": 2}
    assert sum("_assert_async" in str(n.target) for n in fused.graph.nodes) == 2  # of cos, of sin
    fxfuse.verify(program, fused)
    torch.testing.assert_close(fxfuse.unfuse(fused).module()(*inputs), fused.module()(*inputs))


def test_a_file_holds_the_tables_and_checks_nothing() -> None:
    exported = fxfuse.onnx.export(Rotated().eval(), (torch.randn(2, 4, 12, WIDTH),), dynamic_shapes=(AXES,))
    kinds = [node.op_type for node in exported.model.graph]
    assert kinds.count("RotaryEmbedding") == 1
    assert "Equal" not in kinds


def test_halves_that_differ_are_no_rotation() -> None:
    model = Rotated().eval()
    model.cos[5, 3] += 1
    program, _ = captured(model, False)
    assert not fxfuse.report(fxfuse.fuse(program)).counts
