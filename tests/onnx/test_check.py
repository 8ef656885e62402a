"""``fxfuse.onnx.export(check=True)`` compares with eager PyTorch in ONNX Runtime, at other sizes too."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from onnxscript import opset18 as op
from torch import nn
from torch.export import Dim

import fxfuse
import fxfuse.onnx
from fxfuse.errors import FxfuseError, ParityError
from fxfuse.onnx import check
from fxfuse.parity.eager import Check

FREE = ({0: Dim.AUTO, 1: Dim.AUTO},)


class Block(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm, self.out = nn.RMSNorm(16, eps=1e-5, dtype=dtype), nn.Linear(16, 8, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(x)).sin()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """The comparisons that the export made."""
    kept: list[Check] = []

    def keep(*args: Any) -> list[Check]:
        found = real(*args)
        kept.extend(found)
        return found

    real = check.check_model
    monkeypatch.setattr(check, "check_model", keep)
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_three_shapes(dtype: torch.dtype, ran: list[Check]) -> None:
    x = torch.randn(2, 4, 16, dtype=dtype)
    fxfuse.onnx.export(Block(dtype).eval(), (x,), dynamic_shapes=FREE, check=True)
    assert [c.sizes for c in ran] == ["2×4×16", "1×4×16", "3×7×16"]
    assert all(c.result.passed and c.result.dtype == str(dtype).removeprefix("torch.") for c in ran)


def test_fixed_sizes_and_no_check(ran: list[Check]) -> None:
    fxfuse.onnx.export(Block().eval(), (torch.randn(2, 4, 16),), check=True)
    assert len(ran) == 1
    fxfuse.onnx.export(Block().eval(), (torch.randn(2, 4, 16),))
    assert len(ran) == 1, "nothing is compared by default"


@pytest.mark.parametrize("fused", [False, True])
def test_a_program(fused: bool, ran: list[Check]) -> None:
    program = torch.export.export(Block().eval(), (torch.randn(2, 4, 16),), dynamic_shapes=FREE)
    fxfuse.onnx.export(fxfuse.fuse(program) if fused else program, check=True)
    assert len(ran) == 3


def wrong_sine(x: Any) -> Any:
    return op.Cos(x)


def test_what_differs_is_not_written(tmp_path: Path) -> None:
    """The message has the largest difference and where it was met."""
    table: dict[Any, Any] = {torch.ops.aten.sin.default: wrong_sine}
    with pytest.raises(ParityError, match=r"largest difference is [12]\.\d+(.|\n)*shape \(\d×\d×16\)"):
        fxfuse.onnx.export(
            Block().eval(),
            (torch.randn(2, 4, 16),),
            tmp_path / "model.onnx",
            dynamic_shapes=FREE,
            custom_translation_table=table,
            check=True,
        )
    assert list(tmp_path.iterdir()) == []


def right_at_two(x: Any) -> Any:
    """sin(x) · B / 2, which is sin(x) at the sample's batch of 2."""
    batch = op.CastLike(op.Squeeze(op.Shape(x, start=0, end=1)), x)
    return op.Mul(op.Sin(x), op.Div(batch, op.CastLike(2.0, x)))


def test_a_difference_at_another_batch_only() -> None:
    table: dict[Any, Any] = {torch.ops.aten.sin.default: right_at_two}
    with pytest.raises(ParityError, match=r"batch 1|other shape"):
        fxfuse.onnx.export(
            Block().eval(),
            (torch.randn(2, 4, 16),),
            dynamic_shapes=FREE,
            custom_translation_table=table,
            check=True,
        )


class Counter(nn.Module):
    """Counts its calls in a buffer, and adds the count."""

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor([5.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x + self.count


def test_state_goes_from_call_to_call_and_is_put_back(ran: list[Check]) -> None:
    model = Counter().eval()
    fxfuse.onnx.export(model, (torch.randn(2, 4),), dynamic_shapes=FREE, check=True)
    assert len(ran) == 3 and all(c.result.passed for c in ran)
    assert model.count.item() == 5.0


class Table(nn.Module):
    """Rows for 18 positions; the capture does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(18, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.rows(torch.arange(x.shape[1]))


def test_a_shorter_length_where_there_is_no_room(ran: list[Check]) -> None:
    fxfuse.onnx.export(Table().eval(), (torch.randn(2, 16, 8),), dynamic_shapes=FREE, check=True)
    assert [c.sizes for c in ran] == ["2×16×8", "1×16×8", "3×15×8"]


def test_a_size_is_a_tensor() -> None:
    class Sized(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
            return x * 2, x.shape[1]

    fxfuse.onnx.export(Sized().eval(), (torch.randn(2, 4),), dynamic_shapes=FREE, check=True)


def test_without_values_or_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        block, x = Block().eval(), torch.randn(2, 4, 16)
    with pytest.raises(FxfuseError, match="weights on the meta device hold no values"):
        fxfuse.onnx.export(block, (x,), check=True)

    def absent(name: str, *rest: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *rest)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(FxfuseError, match=r"onnxruntime is not installed(.|\n)*fxfuse\[ort\]"):
        fxfuse.onnx.export(Block().eval(), (torch.randn(2, 4, 16),), check=True)
