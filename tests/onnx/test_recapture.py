"""A model that asks whether its length is a multiple of something is captured so that every length is right."""

from __future__ import annotations

import json
import re
import warnings

import jsonschema
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import fxfuse.onnx
from fxfuse.errors import FxfuseWarning
from fxfuse.onnx.capturing.capture import capture
from fxfuse.parity.ort import OnnxRuntime
from fxfuse.report.record import dumps, record, schema


class Chunks(nn.Module):
    """Sums over chunks of four, the last one padded; the padding is cut only where there is some (Mamba 2)."""

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        padding = (4 - length % 4) % 4
        chunks = F.pad(x, (0, 0, 0, padding)).reshape(x.shape[0], -1, 4, x.shape[2])
        y = chunks.cumsum(2).reshape(x.shape[0], -1, x.shape[2])
        if padding > 0:
            y = y[:, :length]
        return y.tanh()


class Marked(nn.Module):
    """One length is treated apart."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() if x.shape[1] != 5 else x.cos()


class Square(nn.Module):
    """Four times as long as the batch is large, as in the sample, is treated apart."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() if x.shape[1] == 4 * x.shape[0] else x.cos()


class Counted(nn.Module):
    """Writes in place, besides."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x.sin() + self.count if x.shape[1] % 4 == 0 else x.cos()


class Harmless(nn.Module):
    """Sizes are asked, and what is computed is the same."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 4 * x.shape[0]:
            return x.sin()
        return x.sin() * 1.0 if x.shape[1] != 5 else x.sin() + 0.0


class Alternating(nn.Module):
    """Two functions for two kinds of length: no one program is right for both."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() if x.shape[1] % 4 == 0 else x.cos()


DYNAMIC = ({0: Dim.AUTO, 1: Dim.AUTO},)


@pytest.mark.parametrize("length", [8, 7])
def test_holds_at_every_length(length: int) -> None:
    module = Chunks().eval()
    run = OnnxRuntime(fxfuse.onnx.export(module, (torch.randn(2, length, 3),), dynamic_shapes=DYNAMIC))
    for batch, other in ((2, 8), (3, 5), (1, 12), (2, 7)):
        x = torch.randn(batch, other, 3)
        (got,) = run(x)
        torch.testing.assert_close(got, module(x))


def test_another_capture_that_computes_something_else_is_not_taken() -> None:
    module, x = Alternating().eval(), torch.randn(2, 8, 3)
    program = capture(module, (x,), dynamic_shapes=DYNAMIC)
    torch.testing.assert_close(program.module()(x), x.sin())


def test_a_capture_without_such_guards_is_the_first() -> None:
    module, x = nn.Linear(3, 3).eval(), torch.randn(2, 8, 3)
    program = capture(module, (x,), dynamic_shapes=DYNAMIC)
    assert program.example_inputs[0][0].shape == x.shape


@pytest.mark.parametrize(
    ("module", "said", "guard"),
    [
        (Alternating, "the graph holds for some sizes of x.shape[1] alone", "Mod"),
        (Marked, "the graph holds for some sizes of x.shape[1] alone", "Ne("),
        (Square, "x.shape[1] is computed from other sizes in the graph", "4*"),
        (Counted, "the graph holds for some sizes of x.shape[1] alone", "Mod"),
    ],
)
def test_a_capture_that_is_right_at_some_lengths_alone_is_said(module: type[nn.Module], said: str, guard: str) -> None:
    """In a warning and in the report, with the line and what to do."""
    with pytest.warns(FxfuseWarning, match=re.escape(said)) as warned:
        exported = fxfuse.onnx.export(module().eval(), (torch.randn(2, 8, 3),), dynamic_shapes=DYNAMIC)
    (message,) = [str(warning.message) for warning in warned if said in str(warning.message)]
    (entry,) = fxfuse.report(exported).near_misses("torch.export")
    assert entry.reason is not None and entry.source is not None
    assert entry.parameters == {"dimension": "x.shape[1]"} and "test_recapture.py" in entry.source
    for text in (message, entry.reason):
        assert said in text and guard in text and "change that line" in text
    assert said in str(fxfuse.report(exported))
    jsonschema.validate(json.loads(dumps(record(fxfuse.report(exported)))), schema(), jsonschema.Draft202012Validator)


def test_sizes_that_are_asked_without_a_difference_are_no_loss() -> None:
    module = Harmless().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FxfuseWarning)
        exported = fxfuse.onnx.export(module, (torch.randn(2, 8, 3),), dynamic_shapes=DYNAMIC)
    assert not fxfuse.report(exported).near_misses("torch.export")
    for batch, length in ((2, 8), (2, 5), (3, 7), (1, 4)):
        x = torch.randn(batch, length, 3)
        torch.testing.assert_close(OnnxRuntime(exported)(x)[0], module(x))


def test_a_guard_that_has_no_value_at_some_size_is_no_error() -> None:
    """SEW-D and wav2vec2-conformer ask for remainders by what is 0 at two samples."""

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            n = x.shape[1]
            return x * 2 if (3 * n) % (n - 2) != 1 else x

    x = torch.randn(2, 16, 8)
    exported = fxfuse.onnx.export(Asks().eval(), (x,), dynamic_shapes=({0: "batch", 1: "length"},))
    (found,) = OnnxRuntime(exported)(torch.randn(3, 11, 8))
    assert found.shape == (3, 11, 8)
