"""Captures are as dynamic as they are asked to be, in whatever style, and say what is not."""

from __future__ import annotations

import dataclasses
import enum
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import fxfuse.onnx
from fxfuse import FxfuseError, FxfuseWarning
from fxfuse.parity.ort import OnnxRuntime

STYLES: dict[str, Any] = {
    "AUTO": (Dim.AUTO, Dim.AUTO),
    "DYNAMIC": (Dim.DYNAMIC, Dim.DYNAMIC),
    "names": ("batch", "length"),
    "Dim": (Dim("batch"), Dim("length")),
    "Dim from 1": (Dim("batch", min=1), Dim("length", min=1, max=64)),
}
style = pytest.mark.parametrize("style", STYLES)


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (8,), eps=1e-5)


class Table(nn.Module):
    """Positions of a table with 64 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(64, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rows[: x.shape[1]]


class Grown(nn.Module):
    """Distances, as long as the longest sequence so far."""

    distances: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("distances", None, persistent=False)
        self(torch.zeros(1, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if self.distances is None or self.distances.shape[0] < length:
            at = torch.arange(length)
            self.distances = (at[:, None] - at).abs().float()
        return F.scaled_dot_product_attention(x, x, x, attn_mask=-self.distances[:length, :length])


class OneApart(nn.Module):
    """A batch of one is written another way, and computes the same."""

    def forward(self, x: Tensor) -> Tensor:
        return x[0].sin()[None] if x.shape[0] == 1 else x.sin()


class Square(nn.Module):
    """Batch and length are compared."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] == x.shape[1] else x + x


class Padded(nn.Module):
    """Sums of four neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        missing = -x.shape[1] % 4
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
        return x.unflatten(1, (-1, 4)).sum(2)


MODELS = {
    "norm": (Norm, [(2, 5), (1, 5), (5, 1), (1, 1), (3, 3)]),
    "table": (Table, [(2, 5), (1, 1), (2, 64)]),
    "grown": (Grown, [(2, 16), (1, 16), (2, 9)]),
    "one apart": (OneApart, [(1, 5), (3, 5)]),
    "square": (Square, [(4, 4), (3, 5)]),
    "padded": (Padded, [(1, 8), (2, 7)]),
}
CASES = [
    (name, sample, style)
    for name, (_, samples) in MODELS.items()
    for place, sample in enumerate(samples)
    for style in (STYLES if place == 0 else ["AUTO", "Dim"][place % 2 :][:1])
]


@pytest.mark.parametrize(("name", "sample", "style"), CASES, ids=[" ".join(map(str, case)) for case in CASES])
def test_holds_at_other_sizes(name: str, sample: tuple[int, int], style: str) -> None:
    batch, length = STYLES[style]
    model = MODELS[name][0]().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxfuseWarning)  # of the bound that Grown has
        exported = fxfuse.onnx.export(model, (torch.randn(*sample, 8),), dynamic_shapes=({0: batch, 1: length},))
    run = OnnxRuntime(exported)
    for other in (sample, (2, 12), (3, 7), (1, 4), (4, 4)):
        x = torch.randn(*other, 8)
        torch.testing.assert_close(run(x)[0], model(x), rtol=1e-4, atol=1e-5)
    assert not any(str(dim).isdecimal() for value in exported.model.graph.inputs for dim in symbols(value))


def symbols(value: Any) -> list[str]:
    return [dim.value for dim in value.shape if not isinstance(dim, int)]


@pytest.mark.parametrize("style", ["names", "Dim"])
def test_names_are_in_the_graph(style: str) -> None:
    batch, length = STYLES[style]
    exported = fxfuse.onnx.export(Norm(), (torch.randn(1, 5, 8),), dynamic_shapes=({0: batch, 1: length},))
    assert symbols(exported.model.graph.inputs[0]) == symbols(exported.model.graph.outputs[0]) == ["batch", "length"]


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rows


@style
def test_a_dimension_that_stays_fixed_is_named_with_its_line(style: str) -> None:
    batch, length = STYLES[style]
    said = r"x\.shape\[1\] is 5 .*(?s:.*)test_capture\.py:\d+ in forward: return x \+ self\.rows"

    def export() -> torch.onnx.ONNXProgram:
        return fxfuse.onnx.export(Fixed().eval(), (torch.randn(2, 5, 8),), dynamic_shapes=({0: batch, 1: length},))

    if style == "AUTO":
        with pytest.warns(FxfuseWarning, match=said):
            exported = export()
        (dim,) = symbols(exported.model.graph.inputs[0])
        assert exported.model.graph.inputs[0].shape == [dim, 5, 8]
    else:
        with pytest.raises(FxfuseError, match=said):
            export()


class Two(nn.Module):
    """Another function from seven on."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() if x.shape[1] < 7 else x.cos()


class Limited(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 7:
            raise ValueError("too long")
        return x.sin()


@style
def test_what_the_model_does_elsewhere_is_said(style: str) -> None:
    axes = dict(enumerate(STYLES[style]))
    with pytest.warns(FxfuseWarning, match=r"some sizes of x\.shape\[1\].*guard .* < 7, from test_capture\.py"):
        fxfuse.onnx.capture(Two().eval(), (torch.randn(2, 5, 8),), dynamic_shapes=(axes,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FxfuseWarning)
        fxfuse.onnx.capture(Limited().eval(), (torch.randn(2, 5, 8),), dynamic_shapes=(axes,))


@dataclasses.dataclass
class Inner:
    x: Tensor
    factor: int = 3


@dataclasses.dataclass
class Outer:
    inner: Inner
    more: list[Tensor]


@dataclasses.dataclass
class Unknown:
    x: Tensor


for registered in (Inner, Outer):
    torch.export.register_dataclass(registered)


class Kind(enum.Enum):
    SUM = 1


class Nested(nn.Module):
    def forward(self, given: Any, scale: float = 1.0, how: str | None = None) -> Tensor:
        x = given["outer"].inner.x * given["outer"].inner.factor + given["outer"].more[0]
        return x * scale if how is None else getattr(x, how)()


@pytest.mark.parametrize("rest", [(), (2,), (2.5,), (True,), (1.0, None), (1.0, "sin")], ids=str)
def test_numbers_texts_and_dataclasses_are_part_of_the_call(rest: tuple[Any, ...]) -> None:
    x, y = torch.randn(1, 3), torch.randn(1, 3)
    args = ({"outer": Outer(Inner(x), [y])}, *rest)
    axes = ({"outer": [[{0: "batch"}, None], [{0: "batch"}]]}, *(None for _ in rest))
    run = OnnxRuntime(fxfuse.onnx.export(Nested().eval(), args, dynamic_shapes=axes))
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    torch.testing.assert_close(run(x, y)[0], Nested()({"outer": Outer(Inner(x), [y])}, *rest))


@pytest.mark.parametrize("dim", [Dim.AUTO, Dim.DYNAMIC, "count", Dim("count")], ids=str)
def test_a_dynamic_number_is_an_input(dim: Any) -> None:
    class Scale(nn.Module):
        def forward(self, x: Tensor, n: int) -> Tensor:
            return x * n

    run = OnnxRuntime(fxfuse.onnx.export(Scale().eval(), (torch.ones(2), 3), dynamic_shapes=(None, dim)))
    torch.testing.assert_close(run(torch.ones(2), torch.tensor(5))[0], torch.full((2,), 5.0))


REFUSED = {
    "dataclass": (Unknown(torch.ones(2)), "register_dataclass"),
    "enum": (Kind.SUM, r"\.value"),
    "type": (torch.float32, "bind the value"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_an_input_is_refused_with_what_to_do(kind: str) -> None:
    value, hint = REFUSED[kind]
    with pytest.raises(FxfuseError, match=rf"(?s)does not take.*args\[0\].*{hint}"):
        fxfuse.onnx.capture(Norm().eval(), (value,))


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 3).eval()
    for x in (torch.ones(2, 3), torch.ones(2, 3, device="meta")):
        with pytest.raises(FxfuseError, match=r"(?s)meta device.*weight.*to_empty"):
            fxfuse.onnx.export(model, (x,))


class Trained(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.weight, self.dropout, self.p = nn.Linear(8, 8), nn.Dropout(p), p

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.weight(x))
        return F.scaled_dot_product_attention(x, x, x, dropout_p=self.p if self.training else 0.0)


class Otherwise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin() if self.training else x.cos()


def test_training_that_changes_nothing_is_a_warning() -> None:
    model, x = Trained(0.0), torch.randn(2, 3, 8)
    model.weight.eval()
    with pytest.warns(FxfuseWarning, match="Trained is in training mode"):
        exported = fxfuse.onnx.export(model, (x,), dynamic_shapes=({0: "batch"},))
    torch.testing.assert_close(OnnxRuntime(exported)(x)[0], model.eval()(x))
    model.train()
    model.weight.eval()
    fxfuse.onnx.capture(model, (x,))
    assert [part.training for part in (model, model.weight, model.dropout)] == [True, False, True]


@pytest.mark.parametrize(
    ("model", "line"),
    [(Trained(0.1), "dropout"), (Otherwise(), "x.sin"), (nn.BatchNorm1d(3), "batchnorm.py")],
    ids=["dropout", "branch", "batch norm"],
)
def test_training_that_changes_something_is_refused_with_its_line(model: nn.Module, line: str) -> None:
    with pytest.raises(FxfuseError, match=rf"(?s)in training mode.*{line}.*\.eval\(\)"):
        fxfuse.onnx.export(model, (torch.randn(2, 3, 8),))
    assert all(part.training for part in model.modules())
