"""Rotary embeddings: pairs that end elsewhere than they were, single pairs, tables made under no_grad or complex."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import fxfuse
import fxfuse.onnx
from fxfuse.parity.ort import OnnxRuntime
from tests.patterns.models import export

HEADS, SIZE = 4, 8


class Rotary(nn.Module):
    """``x [B, S, H·D]`` rotated by positions, angles computed under no_grad as transformers does."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("frequencies", 1e4 ** -(torch.arange(0, size, 2) / size))

    def angles(self, x: Tensor) -> Tensor:
        """``[1, 1, S, D/2]``"""
        with torch.no_grad():
            return torch.outer(torch.arange(x.shape[1]).float(), self.frequencies)[None, None]

    def forward(self, x: Tensor) -> Tensor:
        heads = x.view(x.shape[0], x.shape[1], -1, self.size).transpose(1, 2)
        return torch.tanh(self.rotate(heads, self.angles(x)))

    def rotate(self, x: Tensor, angles: Tensor) -> Tensor:
        raise NotImplementedError


class Halves(Rotary):
    """Llama: cos and sin of both halves are one table, joined under no_grad."""

    def angles(self, x: Tensor) -> Tensor:
        angles = super().angles(x)
        with torch.no_grad():
            return torch.cat([angles, angles], -1)

    def rotate(self, x: Tensor, angles: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


class NeighboursLeftAsHalves(Rotary):
    """DeepSeek-V3: takes neighbours, leaves halves."""

    def rotate(self, x: Tensor, angles: Tensor) -> Tensor:
        first, second = x[..., 0::2], x[..., 1::2]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class HalvesLeftAsNeighbours(Rotary):
    """The other way round."""

    def rotate(self, x: Tensor, angles: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)


class Complex(Rotary):
    """Llama 4: a complex table, moved about before it is multiplied with."""

    def rotate(self, x: Tensor, angles: Tensor) -> Tensor:
        with torch.no_grad():
            table = torch.polar(torch.ones_like(angles[0, 0]), angles[0, 0])
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * table[None, :, :].unsqueeze(1)).flatten(-2)


MODELS = [Halves, NeighboursLeftAsHalves, HalvesLeftAsNeighbours, Complex]


def rotations(program: ExportedProgram) -> int:
    return sum(n.target is torch.ops.fxfuse.rotary_embedding.default for n in program.graph.nodes)


@pytest.mark.parametrize("size", [2, SIZE])
@pytest.mark.parametrize("model", MODELS)
def test_is_one_rotary_embedding(model: type[Rotary], size: int) -> None:
    module = model(size)
    fused = fxfuse.fuse(export(module, torch.randn(2, 6, HEADS * size)))
    assert rotations(fused) == 1, fxfuse.report(fused)
    for shape in ((2, 6), (1, 3), (3, 9)):
        x = torch.randn(*shape, HEADS * size)
        torch.testing.assert_close(fused.module()(x), module(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_runs_in_onnx_runtime_at_another_shape(model: type[Rotary]) -> None:
    module, x = model().eval(), torch.randn(2, 6, HEADS * SIZE)
    program = fxfuse.onnx.export(module, (x,), dynamic_shapes=({0: "batch", 1: "sequence"},))
    assert [n.op_type for n in program.model.graph].count("RotaryEmbedding") == 1
    run = OnnxRuntime(program)
    for shape in ((2, 6), (1, 5), (3, 9)):
        x = torch.randn(*shape, HEADS * SIZE)
        (got,) = run(x)
        torch.testing.assert_close(got, module(x), rtol=1e-4, atol=1e-5)


def test_what_runs_under_no_grad_stays_there() -> None:
    """The table's submodule is left as it came."""
    fused = fxfuse.fuse(export(Halves(), torch.randn(2, 6, HEADS * SIZE)))
    assert any("wrap_with_set_grad_enabled" in str(n.target) for n in fused.graph.nodes)


class FrozenBlock(nn.Module):
    """A norm and a projection that run under no_grad, as the first cycles of a recurrent model do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16))
        self.out = nn.Linear(16, 16)

    def norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = self.out(self.norm(x))
        return self.norm(frozen)


def test_layers_under_no_grad_are_fused_and_pass_no_gradient() -> None:
    module = FrozenBlock()
    program = export(module, torch.randn(2, 6, 16))
    fused = fxfuse.fuse(program)
    assert fxfuse.report(fused).counts == {"RMSNormalization": 2}
    assert any("wrap_with_set_grad_enabled" in str(n.target) for n in program.graph.nodes), "the caller's is unchanged"
    x = torch.randn(3, 4, 16)
    grads = []
    for run in (module, fused.module()):
        run.zero_grad()
        run(x).square().sum().backward()
        grads.append({name: p.grad for name, p in run.named_parameters()})
    assert grads[0]["out.weight"] is None and grads[1]["out.weight"] is None
    torch.testing.assert_close(grads[1]["weight"], grads[0]["weight"])


class ImageGrid(Rotary):
    """DINOv3: the patches of an image lie on a grid of fractions, and half of the features tell rows, half columns.

    https://github.com/facebookresearch/dinov3/blob/main/dinov3/layers/rope_position_encoding.py
    """

    def __init__(self, places: str) -> None:
        super().__init__()
        self.places = places
        self.periods = nn.Buffer(1e2 ** -(torch.arange(0, SIZE, 4) / SIZE), persistent=False)

    def along(self, length: int) -> Tensor:
        if self.places == "arange":
            return 2 * torch.arange(0.5, length, dtype=torch.float32) / length - 1
        return torch.linspace(-1, 1, length)

    def angles(self, x: Tensor) -> Tensor:
        """``[1, 1, S, D]`` of an image of 4 × S/4 patches."""
        grid = torch.meshgrid(self.along(4), self.along(3), indexing="ij")
        angles = torch.stack(grid, -1).flatten(0, 1)[:, :, None] / self.periods  # [S, 2, D/4]
        return angles.flatten(1, 2).tile(2)[None, None]

    def rotate(self, x: Tensor, angles: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


@pytest.mark.parametrize("places", ["arange", "linspace"])
def test_angles_on_the_grid_of_an_image(places: str) -> None:
    torch.manual_seed(0)
    module = ImageGrid(places).eval()
    x = torch.randn(2, 12, HEADS * SIZE)
    fused = fxfuse.fuse(torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)))
    assert fxfuse.report(fused).counts == {"RotaryEmbedding": 1}
    x = torch.randn(3, 12, HEADS * SIZE)
    torch.testing.assert_close(fused.module()(x), module(x), rtol=1e-5, atol=1e-5)
