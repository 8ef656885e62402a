"""The matrix: what it holds, how it is sampled, and that the judge sees a kernel that is slightly wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxfuse.errors import FxfuseError
from fxfuse.kernels.table import kernels as kernel_table
from fxfuse.ops.calls import Draw
from fxfuse.parity.cell import IMPLEMENTATIONS
from fxfuse.parity.matrix import DTYPES, calls, operators
from fxfuse.parity.node import refusal
from fxfuse.parity.operators import cells, widened


@pytest.mark.parametrize("op", operators())
def test_a_sample_of_pairs_holds_every_pair(op: str) -> None:
    def pairs(sample: Any) -> set[tuple[tuple[str, str], ...]]:
        return {pair for call in calls(op, sample) for pair in itertools.combinations(call.point.items(), 2)}

    assert pairs("pairs") == pairs("all")
    assert len(list(calls(op, "pairs"))) < len(list(calls(op, "all"))) / 4


@pytest.mark.parametrize("op", operators())
def test_calls_are_the_same_every_time(op: str) -> None:
    for one, other in itertools.islice(zip(calls(op), calls(op), strict=True), 8):
        assert str(one) == str(other)
        assert all(a is b or torch.equal(a, b) for a, b in zip(one.args, other.args, strict=True))  # type: ignore[arg-type]


def test_layouts_are_what_they_are_called() -> None:
    draw = Draw(0, torch.float16)
    strides = {"contiguous": (12, 4, 1), "transposed": (12, 1, 3), "strided": (24, 8, 2), "sliced": (21, 7, 1)}
    for name, expected in strides.items():
        assert draw.laid_out(name, 2, 3, 4).shape == (2, 3, 4)
        assert draw.laid_out(name, 2, 3, 4).stride() == expected, name
    assert draw.laid_out("offset", 2, 3).storage_offset() == 3
    assert not draw.bools(2, 1, 3, 4)[0, 0, 0].any()


def test_calls_move_with_their_layout() -> None:
    for call in itertools.islice(calls("attention"), 30):
        moved = call.on(torch.device("meta"))
        for before, after in zip(call.args, moved.args, strict=True):
            assert (before is None) == (after is None)
            if before is not None and after is not None:
                assert before.stride() == after.stride() and before.storage_offset() == after.storage_offset()


def test_float64_ignores_the_stash_type() -> None:
    call = next(call for call in calls("rms_norm") if call.point["option"] == "half stash")
    wide = widened(call)
    assert wide.kwargs["stash_type"] == 11 and all(arg is not None and arg.dtype == torch.float64 for arg in wide.args)


def test_an_unknown_operator() -> None:
    with pytest.raises(FxfuseError, match="no operator 'conv'") as caught:
        next(calls("conv"))
    assert "rotary_embedding" in str(caught.value.hint)


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

WRONG: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "one element": ("rms_norm", lambda y: y.index_fill(0, torch.tensor([0], device=y.device), 0.25)),
    "a factor": ("attention", lambda y: y * 1.001),
    "an element off by one": ("tensor_scatter", lambda y: y.roll(1, -1)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, spoil = WRONG[name]
    right = kernel_table()[op]
    wrong = right._replace(function=lambda *args, **kwargs: spoil(right.function(*args, **kwargs)))
    monkeypatch.setitem(kernel_table(), op, wrong)
    large = (c for c in calls(op) if c.dtype == torch.float32 and c.args[0].numel() > 100)  # type: ignore[union-attr]
    found = list(cells(next(large).on(DEVICE), backward=False))
    assert [cell.implementation for cell in found if not cell.passed] == ["triton"]
    assert "error" in str(next(cell.reason for cell in found if not cell.passed))


def test_every_implementation_has_its_cell() -> None:
    call = next(call for call in calls("attention_with_present") if call.dtype == torch.float32)
    found = list(cells(call.on(DEVICE)))
    forward = [cell.implementation for cell in found if cell.subject == "attention_with_present"]
    assert sorted(forward) == sorted(IMPLEMENTATIONS)
    backward = {cell.implementation for cell in found if cell.subject == "attention_with_present backward"}
    assert backward == {"eager", "composite", "triton"}


def test_what_onnx_runtime_is_not_asked() -> None:
    """Reasons are about the CPU provider, and no type or option is left out altogether without one."""
    asked = [call for op in operators() for call in calls(op) if refusal(call) is None]
    assert {call.dtype for call in asked} == set(DTYPES) - {torch.bfloat16}
    assert {call.op for call in asked} == set(operators())
