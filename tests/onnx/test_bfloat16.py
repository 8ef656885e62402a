"""Tables, biases and masks in bfloat16 beside float32: the model loads in ONNX Runtime, and is right."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxfuse.onnx
from fxfuse.parity.ort import onnxruntime_outputs

BF16 = torch.bfloat16
S, D = 12, 16


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Kept(nn.Module):
    """What is kept in bfloat16."""

    def __init__(self, function: Callable[[Kept, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        angle = torch.outer(torch.arange(64.0), 10000 ** (-torch.arange(0, D, 2) / D))
        self.register_buffer("cos", torch.cat([angle.cos()] * 2, -1).to(BF16))
        self.register_buffer("sin", torch.cat([angle.sin()] * 2, -1).to(BF16))
        self.register_buffer("bias", torch.randn(64, 64).to(BF16))
        self.weight = nn.Parameter(torch.randn(D).to(BF16))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)

    def tables(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[: x.shape[2]], self.sin[: x.shape[2]]  # type: ignore[index]


def negated(m: Kept, x: Tensor) -> Tensor:
    (cos, sin), (a, b) = m.tables(x), x.chunk(2, -1)
    cos, minus = cos[:, : D // 2], -sin[:, : D // 2]
    return torch.cat([a * cos + b * minus, b * cos - a * minus], -1)


def negated_before_the_cast(m: Kept, x: Tensor) -> Tensor:
    (cos, sin), (a, b) = m.tables(x), x.chunk(2, -1)
    return x * cos.float() + torch.cat([b, -a], -1) * (-sin).float()


def computed(m: Kept, x: Tensor) -> Tensor:
    angle = torch.outer(torch.arange(x.shape[2]).float(), 10000 ** (-torch.arange(0, D, 2) / D))
    both = torch.cat([angle, angle], -1)
    return rotate(x, both.cos().to(BF16), both.sin().to(BF16))


def biased(m: Kept, x: Tensor) -> Tensor:
    n = x.shape[2]
    return (x @ x.mT / 4 + m.bias[:n, :n] * 2.5).softmax(-1) @ x  # type: ignore[index]


def masked(m: Kept, x: Tensor) -> Tensor:
    hidden = torch.full((x.shape[2], x.shape[2]), torch.finfo(BF16).min, dtype=BF16).triu(1)
    return (x @ x.mT / 4 + hidden).softmax(-1) @ x


CASES: dict[str, tuple[Callable[[Kept, Tensor], Tensor], str]] = {
    "tables": (lambda m, x: rotate(x, *m.tables(x)), "RotaryEmbedding"),
    "tables cast by the model": (lambda m, x: rotate(x, *(t.float() for t in m.tables(x))), "RotaryEmbedding"),
    "negated tables": (negated, "RotaryEmbedding"),
    "negated before the cast": (negated_before_the_cast, "RotaryEmbedding"),
    "computed tables": (computed, "RotaryEmbedding"),
    "bias": (biased, "Attention"),
    "mask": (masked, "Attention"),
    "weight": (lambda m, x: nn.functional.rms_norm(x, (D,), None, 1e-6) * (1 + m.weight), "RMSNormalization"),
}


@pytest.mark.parametrize("name", CASES)
def test_loads_and_is_right(name: str) -> None:
    function, operator = CASES[name]
    model = Kept(function).eval()
    program = fxfuse.onnx.export(model, (torch.randn(2, 4, S, D),), dynamic_shapes=({0: Dim.AUTO, 2: Dim.AUTO},))
    assert fxfuse.report(program).counts == {operator: 1}
    x = torch.randn(3, 4, 9, D)
    torch.testing.assert_close(onnxruntime_outputs(program, (x,))[0], model(x), rtol=1e-5, atol=2e-6)


def test_a_bfloat16_output_stays_one() -> None:
    class Both(Kept):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
            cos, sin = self.tables(x)
            return rotate(x, cos, -sin), -sin, cos * sin

    model = Both(computed).eval()
    x = torch.randn(2, 4, S, D)
    program = fxfuse.onnx.export(model, (x,))
    assert [v.dtype for v in program.model.graph.outputs] == [ir.DataType.FLOAT, *[ir.DataType.BFLOAT16] * 2]
    import onnxruntime as ort

    session = ort.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run_with_ort_values(None, {"x": ort.OrtValue.ortvalue_from_numpy(x.numpy())})
    expected = model(x)
    torch.testing.assert_close(torch.from_numpy(found[0].numpy()), expected[0])
    for one, wanted in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(torch.from_dlpack(one._ortvalue.to_dlpack()), wanted)


def test_a_model_that_computes_in_bfloat16_is_left_alone() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(D, D).to(BF16))

        def forward(self, x: Tensor) -> Tensor:
            return -(x @ self.weight)

    program = fxfuse.onnx.export(Linear().eval(), (torch.randn(2, D).to(BF16),))
    assert [node.op_type for node in program.model.graph] == ["MatMul", "Neg"]
