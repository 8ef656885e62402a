"""Weights kept as integers become DequantizeLinear, whatever way they are scaled; what is no such thing is left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.report.model import Report
from tests.patterns.dequantize_linear.models import WAYS, G, K, N, Written


def fused(
    model: nn.Module, dtype: torch.dtype = torch.float32, *, frozen: bool = True
) -> tuple[Report, list[torch.fx.Node]]:
    """What became of the model, whose numbers must stay, and its DequantizeLinears."""
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(2)).to(dtype)
    program = torch.export.export(model.eval(), (x,))
    result = fxfuse.fuse(program, frozen=frozen)
    nodes = [n for n in result.graph.nodes if n.target is torch.ops.fxfuse.dequantize_linear.default]
    torch.testing.assert_close(result.module()(x), model(x))
    return fxfuse.report(result), nodes


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ways_to_write_it(way: str, dtype: torch.dtype) -> None:
    how, axis, block, zero = WAYS[way]
    report, (node,) = fused(Written(how, dtype=dtype), dtype)
    assert report.counts == {"DequantizeLinear": 1}
    assert node.kwargs.get("block_size") == block
    assert node.kwargs.get("axis", 1) == axis
    assert (len(node.args) > 2 and node.args[2] is not None) == zero
    assert report.fused()[0].parameters["stored"] == "INT4"


@pytest.mark.parametrize("zeros", [torch.int8, torch.int32, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize(("kind", "low"), [(torch.int8, -8), (torch.uint8, 0), (torch.int8, -128), (torch.uint8, 240)])
def test_types_of_integers_and_zero_points(zeros: torch.dtype, kind: torch.dtype, low: int) -> None:
    if zeros == torch.int8:
        zeros = kind
    report, (node,) = fused(Written(WAYS["groups"][0], low=low, kind=kind, zeros=zeros))
    narrow = {-8: "INT4", 0: "UINT4"}
    assert report.fused()[0].parameters["stored"] == narrow.get(low, str(kind).removeprefix("torch.").upper())
    assert node.args[0].meta["val"].dtype == node.args[2].meta["val"].dtype == kind


def test_zero_points_of_another_type_are_looked_at_only_where_they_stay() -> None:
    """`load_state_dict` may put others there, which int8 does not hold."""
    report, nodes = fused(Written(WAYS["groups"][0], zeros=torch.float32), frozen=False)
    assert not nodes or "scale" in report.fused()[0].parameters
    assert not any(len(n.args) > 2 for n in nodes)
    report, (node,) = fused(Written(WAYS["groups"][0], zeros=torch.int8), frozen=False)
    assert len(node.args) > 2


def test_zero_points_that_are_no_integers() -> None:
    model = Written(WAYS["groups"][0], zeros=torch.float32)
    model.z += 0.5
    report, (node,) = fused(model)
    assert report.fused()[0].parameters["zero_point"] == 0  # the integers stay small, and the subtraction stays
    assert node.kwargs.get("block_size") is None


def test_a_short_last_block() -> None:
    """64 columns in blocks of 12: the sixth has four."""
    model = Written(lambda m: m.w * m.s.repeat_interleave(12, 1)[:, :K])
    model.s = torch.cat([model.s, model.s[:, :2] + 1], 1)
    _, (node,) = fused(model)
    assert node.kwargs["block_size"] == 12 and node.args[1].meta["val"].shape == (N, 6)


LEFT: dict[str, Callable[[Written], Tensor]] = {
    "squared": lambda m: m.w.to(m.s.dtype).square() * m.rows[:, None],
    "clamped": lambda m: m.w.to(m.s.dtype).clamp(-5, 5) * m.rows[:, None],
    "looked up": lambda m: torch.linspace(-1, 1, 16)[(m.w + 8).long()],
}


@pytest.mark.parametrize("what", LEFT)
def test_what_is_no_multiple_of_the_integers(what: str) -> None:
    _, nodes = fused(Written(LEFT[what]))
    for node in nodes:  # no more than the cast is taken
        assert node.kwargs.get("block_size") is None


def test_eight_bits_that_wrap_around() -> None:
    """In int8 the difference of integers and zero points wraps around: it is none."""
    how: Callable[[Written], Tensor] = lambda m: ((m.w.view(N, K // G, G) - m.z[..., None]) * m.s[..., None]).view(N, K)  # noqa: E731
    _, nodes = fused(Written(how, low=-128, zeros=torch.int8))
    assert not any(len(n.args) > 2 for n in nodes)


def test_a_weight_of_a_model_larger_than_what_is_asked() -> None:
    """[6000, 2048] in blocks of 32: asked and proven at five rows."""

    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.randint(-8, 8, (6000, 2048), dtype=torch.int8))
            self.register_buffer("s", torch.rand(6000, 64) + 0.1)

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.w.float().view(6000, 64, 32) * self.s[..., None]).view(6000, 2048).t()

    program = torch.export.export(Large(), (torch.randn(1, 2048),))
    (entry,) = fxfuse.report(fxfuse.fuse(program, frozen=True)).fused("DequantizeLinear")
    assert (entry.parameters["axis"], entry.parameters["block_size"], entry.parameters["stored"]) == (1, 32, "INT4")
    assert entry.evidence is not None and entry.evidence.draws >= 6
