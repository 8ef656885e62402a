"""Complex tensors computed as two real ones: each rule, and what stays as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import fxfuse.onnx
from fxfuse.errors import FxfuseError
from fxfuse.graph.complex.arithmetic import is_complex
from fxfuse.graph.complex.real_parts import without_complex
from fxfuse.parity.ort import onnxruntime_outputs

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of z and w, complex [S, 6], and a real x [S, 6]; the result may be complex."""

RULES: dict[str, Function] = {
    "add": lambda z, w, x: torch.add(z, w, alpha=2) + x + 1j,
    "sub": lambda z, w, x: x - z - torch.sub(w, 3.0, alpha=0.5),
    "mul": lambda z, w, x: z * w * 2.0 * (1 + 2j) * x,
    "mul, broadcast": lambda z, w, x: (1j * x[:, :1]) * z[:1] + x[:1] * (w[:, :1] * 1j),
    "div": lambda z, w, x: z / w + z / 3.0 + x / w + w / x,
    "reciprocal": lambda z, w, x: 1.0 / z + torch.reciprocal(w),
    "square": lambda z, w, x: z.square() + w**3,
    "pow": lambda z, w, x: z**1.5 + torch.pow(w, x),
    "exp": lambda z, w, x: torch.exp(1j * x) + torch.exp(z),
    "polar": lambda z, w, x: torch.polar(x.abs(), x) + torch.polar(torch.ones_like(x[:1]), x),
    "complex": lambda z, w, x: torch.complex(x.cos(), x.sin()) * z,
    "view_as_complex": lambda z, w, x: torch.view_as_complex(x.view(-1, 3, 2)) + z[:, :3],
    "conj": lambda z, w, x: z.conj() * w + w.conj().resolve_conj() + z.conj_physical(),
    "adjoint": lambda z, w, x: z.mH.T + w.adjoint().transpose(0, 1),
    "neg": lambda z, w, x: -z,
    "index": lambda z, w, x: z[:, [2, 0, 1]] + w[:, :3],
    "index_select": lambda z, w, x: z.index_select(1, torch.tensor([5, 0])),
    "gather": lambda z, w, x: z.gather(1, (x > 0).long()),
    "split": lambda z, w, x: torch.cat(torch.split(z, [2, 4], 1)[::-1], 1) * w,
    "chunk": lambda z, w, x: torch.cat([z.chunk(2, 1)[1], w.chunk(2, 1)[0]], 1),
    "unbind": lambda z, w, x: torch.stack(z.unbind(1)[::-1], 1),
    "cat of complex and real": lambda z, w, x: torch.cat([z, x, w], 1),
    "stack": lambda z, w, x: torch.stack([z, w, x * 1j], 1),
    "repeat": lambda z, w, x: z.repeat(1, 2) + w.repeat_interleave(2, 1) + z.tile((1, 2)),
    "views": lambda z, w, x: z.reshape(-1, 3, 2).transpose(1, 2).flatten(1) + torch.unflatten(w, 1, (2, 3)).flatten(1),
    "view": lambda z, w, x: (z * w).T.contiguous().view(3, -1, z.shape[0]).permute(2, 0, 1).flatten(1),
    "expand": lambda z, w, x: z[:, None, :1].expand(-1, 2, 6) + w[:, None].expand_as(w[:, None]),
    "roll, flip": lambda z, w, x: z.roll(1, 1) + w.flip(1),
    "slice": lambda z, w, x: z[:, 1::2] + w[:, -3:],
    "pad": lambda z, w, x: torch.nn.functional.pad(w.sum(0), (1, 2), value=1.0)[:6] * z,
    "where": lambda z, w, x: torch.where(x > 0, z, w) + torch.where(x > 1, z, 2j) + torch.where(x > 0, x, z),
    "masked_fill": lambda z, w, x: z.masked_fill(x > 0, 1 - 2j),
    "sum": lambda z, w, x: z.sum(1, keepdim=True) + w.mean(1, keepdim=True) + z.cumsum(1),
    "matmul": lambda z, w, x: z @ w.T + w @ z.T.conj() + torch.einsum("ij,kj->ik", z, w),
    "made": lambda z, w, x: z + torch.ones_like(w) + torch.full((6,), 2 + 1j) + torch.zeros(6, dtype=torch.complex64),
    "constant": lambda z, w, x: z * torch.tensor([1j, 2, 3, 4, 5, -1j]),
    "double": lambda z, w, x: (z.to(torch.complex128) * w).to(torch.complex64) + x.double(),
    "real, imag": lambda z, w, x: (z * w).real + (z / w).imag,
    "abs": lambda z, w, x: (z * w).abs() + (1j * x).abs(),
    "angle": lambda z, w, x: (z * w).angle(),
    "cast to real": lambda z, w, x: torch.view_as_real(z * w).sum(-1).to(torch.float64),
}


class Module(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor, w: Tensor, x: Tensor) -> Tensor:
        y = self.function(torch.view_as_complex(z), torch.view_as_complex(w), x)
        return torch.view_as_real(y) if y.is_complex() else y


def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(rows)
    z, w, x = (torch.randn(rows, 6, *two, generator=made) for two in ((2,), (2,), ()))
    return z, w, x


def capture(function: Function) -> ExportedProgram:
    return torch.export.export(Module(function).eval(), inputs(5), dynamic_shapes=({0: Dim("rows")},) * 3)


def complex_calls(program: ExportedProgram) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function" and is_complex(n)]


@pytest.mark.parametrize("name", RULES)
def test_parts_are_what_the_operator_computes(name: str) -> None:
    program = capture(RULES[name])
    graph = str(program.graph)
    real = without_complex(program)
    assert complex_calls(program) and not complex_calls(real)
    assert str(program.graph) == graph, "the caller's program is not changed"
    for rows in (5, 8):
        args = inputs(rows)
        torch.testing.assert_close(real.module()(*args), Module(RULES[name])(*args), rtol=1e-5, atol=1e-5)


def test_all_of_them_run_in_onnx_runtime() -> None:
    class Every(nn.Module):
        def forward(self, z: Tensor, w: Tensor, x: Tensor) -> list[Tensor]:
            return [Module(function)(z, w, x) for function in RULES.values()]

    onnx = fxfuse.onnx.export(Every().eval(), inputs(5), dynamic_shapes=({0: Dim("rows")},) * 3)
    args = inputs(8)
    for name, found, expected in zip(RULES, onnxruntime_outputs(onnx, args), Every()(*args), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4), name


def test_inputs_and_outputs_stay_complex() -> None:
    class Turn(nn.Module):
        def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = z.conj() * 2j
            return y, y.real, z

    z = torch.randn(3, 4, dtype=torch.complex64)
    program = torch.export.export(Turn(), (z,))
    real = without_complex(program)
    for expected, found in zip(Turn()(z), real.module()(z), strict=True):
        torch.testing.assert_close(found, expected)
    (node,) = complex_calls(real)
    assert "view_as_complex" in node


def test_what_has_no_rule_is_given_complex_tensors() -> None:
    program = capture(lambda z, w, x: torch.fft.fft(z.conj() * w).conj() * w)
    real = without_complex(program)
    assert {name.split(".")[1] for name in complex_calls(real)} == {"view_as_complex", "fft_fft"}
    args = inputs(4)
    torch.testing.assert_close(real.module()(*args), program.module()(*args))


def test_what_is_written_in_place_is_read_when_it_is_read() -> None:
    def written(z: Tensor, w: Tensor, x: Tensor) -> Tensor:
        y = z * w
        before = y.conj() * 2
        y.mul_(w)
        return before + y * x

    program = capture(written)
    args = inputs(5)
    torch.testing.assert_close(without_complex(program).module()(*args), Module(written)(*args))


def test_what_neither_side_can_write_is_named() -> None:
    with pytest.raises(FxfuseError, match=r"no complex tensors, and aten.sinh.* known neither.*\n.*test_real_parts"):
        fxfuse.onnx.export(capture(lambda z, w, x: torch.sinh(z * w)))
