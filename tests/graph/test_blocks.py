"""What stands in a block of `no_grad` or `autocast` is fused; a block that holds nothing leaves as it came."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.graph.blocks.inline import inline
from fxfuse.graph.blocks.wrapped import block, flattened
from fxfuse.graph.program import copy_program

from .models import AcrossTheEnd, Layer, NormOfHalf, Untouched, captured, elsewhere, half, heads, off

WHOLE = {"RMSNormalization": 2, "RotaryEmbedding": 2, "Attention": 1}
MODES = {
    "no_grad": (torch.no_grad,),
    "inference_mode": (torch.inference_mode,),
    "autocast off": (off,),
    "autocast of another device": (elsewhere,),
    "off in no_grad": (torch.no_grad, off),
    "no_grad in off": (off, torch.no_grad),
    "off in off": (elsewhere, off),
    "off in on": (half, off),
}


@pytest.mark.parametrize("name", MODES)
def test_is_fused_whole(name: str) -> None:
    module, inputs = Layer(*MODES[name]), heads()
    program = captured(module, *inputs)
    assert any(block(n) is not None for n in program.graph.nodes) or name == "inference_mode"  # export drops that
    fused = fxfuse.fuse(program)
    assert fxfuse.report(fused).counts == WHOLE, fxfuse.report(fused)
    assert all(block(n) is None or not n.users for n in fused.graph.nodes)  # torch leaves empty ones behind
    for shape in ((2, 4, 6, 16), (3, 4, 9, 16)):
        inputs = tuple(torch.randn(shape) for _ in range(3))
        torch.testing.assert_close(fused.module()(*inputs), module(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("modes", [(half,), (off, half), (half, torch.no_grad), (torch.no_grad, half)])
def test_what_autocast_casts_is_written_down(modes: tuple[object, ...]) -> None:
    module, inputs = Layer(*modes), heads()  # type: ignore[arg-type]
    program = captured(module, *inputs)
    fused = fxfuse.fuse(program)
    counts = fxfuse.report(fused).counts
    assert counts == {"RMSNormalization": 2, "RotaryEmbedding": 2}, fxfuse.report(fused)
    got, expected = fused.module()(*inputs), program.module()(*inputs)
    assert got.dtype == expected.dtype
    assert got.requires_grad == expected.requires_grad
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


class Lowered(nn.Module):
    """Attention in bfloat16 within a float32 model."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        with half():
            q = self.project(x)
            return (((q @ q.transpose(-1, -2)) * 0.25).softmax(-1) @ q).float()


def test_what_autocast_computes_in_a_lower_type_is_refused() -> None:
    module, (x, *_) = Lowered(), heads()
    fused = fxfuse.fuse(captured(module, x))
    (entry,) = fxfuse.report(fused)
    assert entry.status == "refused" and "computes it in bfloat16" in str(entry.reason)
    torch.testing.assert_close(fused.module()(x), module(x), rtol=0, atol=0)


class Products(nn.Module):
    """Everything that autocast has a rule for, or none."""

    def forward(self, x: Tensor, w: Tensor, b: Tensor, i: Tensor) -> list[Tensor]:
        with half():
            y = torch.nn.functional.linear(x, w, b)
            found = [y, x @ w, torch.bmm(x, x.transpose(1, 2)), torch.einsum("bij,jk->bik", x, w)]
            found += [torch.baddbmm(b[: x.shape[1]], x, x.transpose(1, 2)), torch.addmm(b, x[0], w), y.softmax(-1)]
            found += [torch.cat([y, x]), torch.stack([y, x]), torch.nn.functional.layer_norm(x, (16,), b), y + x]
            found += [torch.nn.functional.scaled_dot_product_attention(x, x, y), y.exp(), x[:, i] @ w, x.cumsum(1)]
            found += [torch.nn.functional.conv1d(x, w[:5, :, None][:, :5]), torch.outer(b, b), torch.linalg.norm(y)]
        return found


def test_blocks_are_inlined_bit_by_bit() -> None:
    inputs = torch.randn(2, 5, 16), torch.randn(16, 16), torch.randn(16), torch.tensor([0, 3])
    program = captured(Products(), *inputs)
    copy = copy_program(program)
    blocks = inline(copy)
    assert not blocks.left and all(block(n) is None for n in copy.graph.nodes)
    copy.graph_module.recompile()
    for got, expected in zip(copy.module()(*inputs), Products()(*inputs), strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_norm_in_float32_within_half() -> None:
    inputs = torch.randn(2, 5, 16), torch.randn(16, 16)
    fused = fxfuse.fuse(captured(NormOfHalf(), *inputs))
    assert fxfuse.report(fused).counts == {"RMSNormalization": 1}
    torch.testing.assert_close(fused.module()(*inputs), NormOfHalf()(*inputs), rtol=1e-2, atol=1e-2)


def test_what_is_not_fused_leaves_as_it_came() -> None:
    program = captured(Untouched(), torch.randn(2, 5, 16))
    fused = fxfuse.fuse(program)
    assert fxfuse.report(fused).counts == {"RMSNormalization": 1}
    kept = [[n.name for n in flattened(p.graph.nodes) if block(n) is not None] for p in (program, fused)]
    assert kept[0] == kept[1] and len(kept[0]) == 3
    before, after = (p.graph_module.print_readable(print_output=False) for p in (program, fused))
    inner = before.index("class submod")
    assert after[after.index("class submod") :] == before[inner:]
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(fused.module()(x), Untouched()(x))


def test_gradients_stop_where_they_stopped() -> None:
    """A fused norm would give x the gradient of its root."""
    x = torch.randn(2, 5, 16)
    fused = fxfuse.fuse(captured(AcrossTheEnd(), x))
    grads = []
    for run in (AcrossTheEnd(), fused.module()):
        leaf = x.clone().requires_grad_()
        run(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0])


def test_a_gradient_within_a_block_without_stays() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = x * 2
                with torch.enable_grad():
                    z = torch.nn.functional.rms_norm(x, (16,), eps=1e-5)
            return y + z

    x = torch.randn(2, 5, 16, requires_grad=True)
    fused = fxfuse.fuse(captured(Inner(), x.detach()))
    got, expected = fused.module()(x), Inner()(x)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected)))


def test_a_block_whose_casts_cannot_be_said_is_left_and_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without the device that the program was captured for."""

    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with half():
                return torch.nn.functional.rms_norm(x, (16,), eps=1e-5) @ x.transpose(-1, -2)

    inputs = (torch.randn(2, 5, 16),)
    program = captured(Norm(), *inputs)
    monkeypatch.setattr("fxfuse.graph.blocks.autocast._found", lambda *_: None)
    fused = fxfuse.fuse(program)
    (entry,) = fxfuse.report(fused)
    assert entry.operator == "RMSNormalization" and "torch.autocast('cpu'" in str(entry.reason)
    torch.testing.assert_close(fused.module()(*inputs), Norm()(*inputs), rtol=0, atol=0)
