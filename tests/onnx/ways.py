"""Ten small models, and the ways in which each may be asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import fxfuse.onnx
from fxfuse.cli import main
from fxfuse.onnx.capturing.asked import as_auto
from fxfuse.parity.ort import OnnxRuntime

D = 16


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(D, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * 2


class Rotate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(64.0), 10000 ** (-torch.arange(0, D // 2, 2) / (D // 2))).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, D // 2)).transpose(1, 2)
        a, b = q.chunk(2, -1)
        cos, sin = self.cos[: x.shape[1]].to(q), self.sin[: x.shape[1]].to(q)  # type: ignore[index]
        return (q * cos + torch.cat([-b, a], -1) * sin).transpose(1, 2).flatten(2)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, D // 2)).transpose(1, 2)


class Attend(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(heads(x), heads(x), heads(x)).transpose(1, 2).flatten(2)


class Causal(nn.Module):
    """Written out, with a mask made for the length."""

    def forward(self, x: Tensor) -> Tensor:
        q = heads(x)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = (q @ q.transpose(-1, -2) / D**0.5).masked_fill(hidden, float("-inf"))
        return (scores.softmax(-1) @ q).transpose(1, 2).flatten(2)


class Grouped(nn.Module):
    """Four query heads, two for k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(D, D), nn.Linear(D, D // 2), nn.Linear(D, D // 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, 4, D // 4).transpose(1, 2)
        k, v = (f(x).view(batch, length, 2, D // 4).transpose(1, 2) for f in (self.k, self.v))
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, D)


class Distances(nn.Module):
    """A bias for distances up to 15."""

    def __init__(self) -> None:
        super().__init__()
        at = torch.arange(16)
        self.register_buffer("bias", -(at[:, None] - at).abs().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length, bias = x.shape[1], self.bias
        assert isinstance(bias, Tensor)
        if bias.shape[0] < length:
            raise ValueError("too long")
        bias = bias[:length, :length].to(x)
        return F.scaled_dot_product_attention(heads(x), heads(x), heads(x), bias).transpose(1, 2).flatten(2)


class Padded(nn.Module):
    """Means of four neighbours, of a norm."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.rms_norm(x, (D,), eps=1e-5)
        missing = -x.shape[1] % 4
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
        return x.unflatten(1, (-1, 4)).mean(2)


class OneApart(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = F.rms_norm(x, (D,), eps=1e-5)
        return x[0].tanh()[None] if x.shape[0] == 1 else x.tanh()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Norm(), Grouped(), Norm()])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + part(x)
        return x


class Square(nn.Module):
    """Batch and length are compared."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.rms_norm(x, (D,), eps=1e-5)
        return x * 2 if x.shape[0] == x.shape[1] else x + x


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "norm": (Norm, {"RMSNormalization": 1}),
    "rotate": (Rotate, {"RotaryEmbedding": 1}),
    "attend": (Attend, {"Attention": 1}),
    "causal": (Causal, {"Attention": 1}),
    "grouped": (Grouped, {"Attention": 1}),
    "distances": (Distances, {"Attention": 1}),
    "padded": (Padded, {"RMSNormalization": 1}),
    "one apart": (OneApart, {"RMSNormalization": 1}),
    "block": (Block, {"RMSNormalization": 2, "Attention": 1}),
    "square": (Square, {"RMSNormalization": 1}),
}

STYLES: dict[str, tuple[Any, Any]] = {
    "AUTO": (Dim.AUTO, Dim.AUTO),
    "DYNAMIC": (Dim.DYNAMIC, Dim.DYNAMIC),
    "names": ("batch", "length"),
    "Dim": (Dim("batch"), Dim("length")),
    "mixed": ("batch", Dim.AUTO),
}

Run = Callable[[Tensor], Tensor]


def build(name: str, style: str, batch: int, length: int, dtype: str) -> tuple[Any, ...]:
    """What a factory gives to ``fxfuse export tests.onnx.ways:build --set name=…``."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    axes = dict(enumerate(STYLES[style]))
    return MODELS[name][0]().to(kind).eval(), (torch.randn(batch, length, D).to(kind),), {}, (axes,)


def exported(way: tuple[Any, ...]) -> tuple[Run, dict[str, int]]:
    model, args, _, axes = build(*way)
    program = fxfuse.onnx.export(model, args, dynamic_shapes=axes)
    return _ran(OnnxRuntime(program)), fxfuse.report(program).counts


def captured_first(way: tuple[Any, ...]) -> tuple[Run, dict[str, int]]:
    model, args, _, axes = build(*way)
    program = fxfuse.onnx.export(fxfuse.onnx.capture(model, args, dynamic_shapes=axes))
    return _ran(OnnxRuntime(program)), fxfuse.report(program).counts


def plugged_in(way: tuple[Any, ...]) -> tuple[Run, dict[str, int]]:
    model, args, _, axes = build(*way)
    with fxfuse.onnx.enabled():
        program = torch.onnx.export(model, args, dynamic_shapes=axes, dynamo=True, opset_version=24, verbose=False)
    assert program is not None
    return _ran(OnnxRuntime(program)), fxfuse.report(program).counts


def decorated(way: tuple[Any, ...]) -> tuple[Run, dict[str, int]]:
    """In PyTorch; torch.export takes no names, and refuses a `Dim` that it would bound."""
    model, args, _, axes = build(*way)
    program = fxfuse.prepass(torch.export.export)(model, args, dynamic_shapes=as_auto(axes))
    return program.module(), fxfuse.report(program).counts


def from_the_shell(way: tuple[Any, ...]) -> tuple[Run, dict[str, int]]:
    names = "name", "style", "batch", "length", "dtype"
    settings = [f"--set={name}={value!r}" for name, value in zip(names, way, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        code = main(["export", "tests.onnx.ways:build", *settings, "--no-parity", "--out", str(out)])
        assert code == 0, f"exit code {code}"
        run = OnnxRuntime(out / "model.onnx")
        return _ran(run), {}


def _ran(run: OnnxRuntime) -> Run:
    return lambda x: run(x)[0]


DOORS = {
    "export": exported,
    "captured first": captured_first,
    "plugin": plugged_in,
    "prepass": decorated,
    "shell": from_the_shell,
}
