"""What memory can look like: nothing in it, strides of zero, offsets past 2³¹, and values that kernels trip over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxfuse import kernels
from fxfuse.kernels.switch import use_kernels
from tests.kernels.device import DEVICE

ops = torch.ops.fxfuse
HUGE = 2**31
"""A stride; elements that far apart need offsets of 64 bits."""


def rand(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def composite(op: str, *args: Any, **kwargs: Any) -> Any:
    with use_kernels("never"):
        return getattr(ops, op)(*args, **kwargs)


def whole(values: list[int]) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def far_apart(tensor: Tensor) -> Tensor:
    """The same values, the two entries of the first dimension HUGE elements apart. What lies between is not touched."""
    assert tensor.shape[0] == 2
    rest = torch.empty(0, *tensor.shape[1:], dtype=tensor.dtype).stride()[1:]
    base = torch.empty(HUGE + tensor[0].numel(), dtype=tensor.dtype, device=DEVICE)
    return base.as_strided(tensor.shape, (HUGE, *rest)).copy_(tensor)


def along_rows(tensor: Tensor) -> Tensor:
    """The same values, the rows (dimension 2 of 4) HUGE elements apart."""
    return far_apart(tensor.movedim(2, 0).contiguous()).movedim(0, 2)


def far_case(name: str) -> tuple[str, tuple[Tensor | None, ...], dict[str, Any]]:
    """Operator, arguments and attributes. Made when it runs: each tensor reserves 4 GB of addresses."""
    if name == "rms_norm":
        return name, (far_apart(rand(2, 24)), rand(24)), {}
    if name == "rotary_embedding":
        return name, (far_apart(rand(2, 2, 3, 8)), rand(2, 3, 4), rand(2, 3, 4)), {}
    if name == "positions":
        caches = far_apart(rand(2, 4)), rand(2, 4)
        return "rotary_embedding", (along_rows(rand(1, 2, 2, 8)), *caches, whole([1, 0]).unsqueeze(0)), {}
    if name == "attention":
        return name, (along_rows(rand(1, 4, 2, 16)), along_rows(rand(1, 2, 2, 16)), rand(1, 2, 2, 16)), {}
    if name == "mask":
        return "attention", (*[rand(1, 2, 2, 16)] * 3, along_rows(rand(1, 2, 2, 2))), {"softcap": 2.0}
    return name, (far_apart(rand(2, 3, 5, 4)), rand(2, 3, 1, 4), whole([4, 0])), {}


FAR = ("rms_norm", "rotary_embedding", "positions", "attention", "mask", "tensor_scatter")


@pytest.mark.parametrize("name", FAR)
def test_offsets_of_64_bits(name: str) -> None:
    op, args, kwargs = far_case(name)
    expected = composite(op, *(a if a is None else a.contiguous() for a in args), **kwargs)
    torch.testing.assert_close(kernels.run(op, *args, **kwargs), expected, rtol=2e-3, atol=2e-3)


EMPTY: dict[str, tuple[str, tuple[Tensor | None, ...], dict[str, Any]]] = {
    "no rows": ("rms_norm", (rand(0, 8), rand(8)), {}),
    "empty rows": ("rms_norm", (rand(3, 0), rand(0)), {}),
    "no tokens": ("rotary_embedding", (rand(2, 2, 0, 8), rand(2, 0, 4), rand(2, 0, 4)), {}),
    "no queries": ("attention", (rand(2, 2, 0, 8), rand(2, 2, 3, 8), rand(2, 2, 3, 8)), {}),
    "no keys": ("attention", (rand(2, 2, 3, 8), rand(2, 2, 0, 8), rand(2, 2, 0, 8)), {}),
    "no batch": ("attention", (rand(0, 2, 3, 8), rand(0, 2, 3, 8), rand(0, 2, 3, 8)), {"is_causal": 1}),
    "empty past": ("attention_with_present", (*[rand(1, 2, 3, 8)] * 3, None, *[rand(1, 2, 0, 8)] * 2), {}),
    "empty cache": ("tensor_scatter", (rand(2, 3, 0, 8), rand(2, 3, 0, 8)), {}),
    "empty update": ("tensor_scatter", (rand(2, 3, 4, 8), rand(2, 3, 0, 8), whole([4, 0])), {}),
}


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_there(name: str) -> None:
    op, args, kwargs = EMPTY[name]
    args = tuple(a.detach().requires_grad_() if a is not None and a.is_floating_point() else a for a in args)

    def run() -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
        found = getattr(ops, op)(*args, **kwargs)
        outputs = [found] if isinstance(found, Tensor) else list(found)
        leaves = [a for a in args if a is not None and a.requires_grad]
        gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], allow_unused=True)
        return [output.detach() for output in outputs], gradients

    with use_kernels("never"):
        expected, expected_gradients = run()
    with use_kernels("always") as declined:
        found, gradients = run()
    assert not declined
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(gradients, expected_gradients, rtol=2e-3, atol=2e-3)


def test_what_expands_is_not_copied_wrongly() -> None:
    """Strides of zero in every operand, and a gradient that is one number."""
    x = rand(1, 1, 16).expand(3, 5, 16).detach().requires_grad_()
    with use_kernels("never"):
        expected = torch.autograd.grad(ops.rms_norm(x, rand(1).expand(16)).sum(), x)
    with use_kernels("always"):
        torch.testing.assert_close(torch.autograd.grad(ops.rms_norm(x, rand(1).expand(16)).sum(), x), expected)
    k = rand(1, 1, 1, 16).expand(2, 2, 4, 16)
    torch.testing.assert_close(kernels.run("attention", k, k, k), composite("attention", k, k, k), rtol=2e-3, atol=2e-3)


def test_a_mask_of_the_lowest_floats_has_a_gradient() -> None:
    """All scores are the lowest float32 then: log Σ e^s would drown in it, and every weight would come out as 1."""
    q, k, v = (rand(1, 2, 3, 8, dtype=torch.float32).requires_grad_() for _ in range(3))
    mask = torch.zeros(1, 1, 3, 3, device=DEVICE)
    mask[..., 0, :] = torch.finfo(torch.float32).min
    with use_kernels("never"):
        expected = torch.autograd.grad(ops.attention(q, k, v, mask).square().sum(), (q, k, v))
    with use_kernels("always"):
        found = torch.autograd.grad(ops.attention(q, k, v, mask).square().sum(), (q, k, v))
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy says that exp overflows, in the interpreter
def test_large_scores_do_not_overflow() -> None:
    q = rand(1, 1, 4, 16, dtype=torch.float32) * 1e4
    torch.testing.assert_close(kernels.run("attention", q, q, q), composite("attention", q, q, q))
    capped = kernels.run("attention", q, q, q, softcap=30.0)
    torch.testing.assert_close(capped, composite("attention", q, q, q, softcap=30.0), rtol=1e-5, atol=1e-2)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy says that infinity times zero is no number
def test_nan_and_infinity_are_kept() -> None:
    x = rand(4, 16, dtype=torch.float32)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        torch.testing.assert_close(
            kernels.run("rms_norm", x.to(dtype), rand(16).to(dtype)),
            composite("rms_norm", x.to(dtype), rand(16).to(dtype)),
            equal_nan=True,
        )


def test_positions_outside_the_caches_are_nan() -> None:
    x, cache = rand(1, 1, 3, 8), rand(5, 4)
    y = kernels.run("rotary_embedding", x, cache, cache, whole([5, 4, -1]).unsqueeze(0))
    assert y[0, 0, [0, 2]].isnan().all() and not y[0, 0, 1].isnan().any()


def test_every_type_can_be_cached() -> None:
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.complex64):
        cache, update = (torch.arange(n, device=DEVICE).reshape(1, 1, -1, 2).to(dtype) for n in (12, 4))
        found = kernels.run("tensor_scatter", cache, update, whole([5]), mode="circular")
        expected = composite("tensor_scatter", cache, update, whole([5]), mode="circular")
        assert found.dtype == dtype and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    assert "16 bytes" in str(kernels.unsupported("tensor_scatter", *[torch.zeros(1, 2, 2, dtype=torch.complex128)] * 2))
