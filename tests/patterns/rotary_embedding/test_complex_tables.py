"""Rotations by complex tables, whatever was done to the table before: one RotaryEmbedding, and nothing complex left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import fxfuse.onnx
from fxfuse.graph.complex.arithmetic import is_complex
from fxfuse.parity.ort import onnxruntime_outputs

B, S, H, D = 2, 12, 4, 16
Table = Callable[[Tensor, Tensor], Tensor]
"""Of the table [32, D/2] and the positions [S], the S rows that turn x."""


def angles(at: Tensor) -> Tensor:
    return at[:, None].float() / 10000 ** (torch.arange(0, D, 2) / D)


def grid(f: Tensor, at: Tensor) -> Tensor:
    """Rows of an image, then columns."""
    rows, columns = f[:3, :4].view(3, 1, 4), f[:4, 4:].view(1, 4, 4)
    return torch.cat([rows.expand(3, 4, 4), columns.expand(3, 4, 4)], -1).reshape(S, D // 2)


def parts(f: Tensor, at: Tensor) -> Tensor:
    a, b = f.split([4, 4], 1)
    return torch.cat([a[:S], b[:S]], -1)


TABLES: dict[str, Table] = {
    "positions": lambda f, at: f[at],
    "index_select": lambda f, at: f.index_select(0, at),
    "gather": lambda f, at: torch.gather(f, 0, at[:, None].expand(-1, D // 2)),
    "split and joined": parts,
    "grid of an image": grid,
    "repeated": lambda f, at: f[:6].repeat(2, 1),
    "interleaved": lambda f, at: f[:6].repeat_interleave(2, 0),
    "unbound": lambda f, at: torch.cat(torch.unflatten(f[at], -1, (2, 4)).unbind(1), 1),
    "padded": lambda f, at: torch.cat([torch.ones(2, D // 2, dtype=f.dtype), f[:10]]),
    "rolled": lambda f, at: f[:S].roll(1, 0).flip(0),
    "chosen": lambda f, at: torch.where((at > 3)[:, None], f[at], f[:S]),
    "conjugated": lambda f, at: f[:S].conj(),
    "conjugated at positions": lambda f, at: f[at].conj_physical(),
    "negated": lambda f, at: -f[:S],
    "exp": lambda f, at: torch.exp(1j * angles(at)),
    "exp of constants": lambda f, at: torch.exp(1j * angles(torch.arange(S))),
    "polar": lambda f, at: torch.polar(torch.ones(S, D // 2), angles(at)),
    "cos + i sin": lambda f, at: angles(at).cos() + 1j * angles(at).sin(),
    "complex": lambda f, at: torch.complex(angles(at).cos(), angles(at).sin()),
    "view_as_complex": lambda f, at: torch.view_as_complex(torch.stack([angles(at).cos(), angles(at).sin()], -1)),
    "power": lambda f, at: f[1:2] ** at[:, None],
    "product": lambda f, at: f[at] * f[1:2],
    "scaled": lambda f, at: f[at] * 1.5,
}


class Turn(nn.Module):
    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table
        a = angles(torch.arange(32))
        self.register_buffer("f", torch.polar(torch.ones_like(a), a))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.table(self.f, at)[:, None]).flatten(3).type_as(x)


def inputs(batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(batch)
    return torch.randn(batch, S, H, D, generator=made).to(dtype), torch.randperm(S, generator=made)


def capture(model: nn.Module, dtype: torch.dtype = torch.float32) -> ExportedProgram:
    return torch.export.export(model.eval(), inputs(B, dtype), dynamic_shapes=({0: Dim.AUTO}, {}))


@pytest.mark.parametrize("name", TABLES)
def test_fused_and_nothing_complex_is_left(name: str) -> None:
    model = Turn(TABLES[name])
    fused = fxfuse.fuse(capture(model))
    assert fxfuse.report(fused).counts == {"RotaryEmbedding": 1}
    reads = {n.target for n in fused.graph.nodes if any(map(is_complex, n.all_input_nodes))}
    assert not any(n.op == "call_function" and is_complex(n) for n in fused.graph.nodes)
    assert reads <= {torch.ops.aten.view_as_real.default}
    for batch in (B, 3):
        torch.testing.assert_close(fused.module()(*inputs(batch)), model(*inputs(batch)), rtol=1e-4, atol=1e-5)


def test_all_of_them_run_in_onnx_runtime() -> None:
    class Every(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turns = nn.ModuleList(map(Turn, TABLES.values()))

        def forward(self, x: Tensor, at: Tensor) -> list[Tensor]:
            return [turn(x, at) for turn in self.turns]

    model = Every().eval()
    program = fxfuse.onnx.export(capture(model))
    assert fxfuse.report(program).counts == {"RotaryEmbedding": len(TABLES)}
    args = inputs(3)
    for name, found, expected in zip(TABLES, onnxruntime_outputs(program, args), model(*args), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("table", [lambda a: torch.exp(1j * a), lambda a: a.cos() + 1j * a.sin()], ids=["exp", "sum"])
def test_a_table_as_long_as_x(table: Callable[[Tensor], Tensor]) -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("angles", angles(torch.arange(32)))

        def forward(self, x: Tensor) -> Tensor:
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * table(self.angles[: x.shape[2]])).flatten(3)

    model = Cut().eval()
    program = fxfuse.onnx.export(model, (torch.randn(2, 4, 12, D),), dynamic_shapes=({0: Dim.AUTO, 2: Dim.AUTO},))
    assert fxfuse.report(program).counts == {"RotaryEmbedding": 1}
    x = torch.randn(3, 4, 9, D)
    torch.testing.assert_close(onnxruntime_outputs(program, (x,))[0], model(x), rtol=1e-4, atol=1e-5)


def test_half_precision_is_turned_in_float32() -> None:
    model = Turn(TABLES["positions"])
    fused = fxfuse.fuse(capture(model, torch.float16))
    assert fxfuse.report(fused).counts == {"RotaryEmbedding": 1}
    args = inputs(3, torch.float16)
    torch.testing.assert_close(fused.module()(*args), model(*args), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("door", ["plugin", "table"])
def test_through_torch_onnx(door: str) -> None:
    model = Turn(TABLES["conjugated at positions"])
    program = capture(model)
    if door == "plugin":
        with fxfuse.onnx.enabled():
            onnx = torch.onnx.export(program, dynamo=True, opset_version=24, verbose=False)
    else:
        table = fxfuse.onnx.translation_table(24)
        fused = fxfuse.fuse(program)
        onnx = torch.onnx.export(fused, dynamo=True, opset_version=24, custom_translation_table=table, verbose=False)
    assert onnx is not None
    assert [node.op_type for node in onnx.model.graph].count("RotaryEmbedding") == 1
    torch.testing.assert_close(onnxruntime_outputs(onnx, inputs(3))[0], model(*inputs(3)), rtol=1e-4, atol=1e-5)


def test_a_table_that_others_read_stays_for_them() -> None:
    class Both(Turn):
        def forward(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x, at), self.f[at]

    model = Both(TABLES["positions"])
    fused = fxfuse.fuse(capture(model))
    assert fxfuse.report(fused).counts == {"RotaryEmbedding": 1}
    for expected, found in zip(model(*inputs(3)), fused.module()(*inputs(3)), strict=True):
        torch.testing.assert_close(found, expected)
    fxfuse.verify(capture(model), fused)
