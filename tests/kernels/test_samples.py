"""Every sample call of the operators through its kernel: what the composite gives, and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxfuse import kernels
from fxfuse.kernels.switch import use_kernels
from fxfuse.ops.calls import moved
from tests.kernels.device import DEVICE
from tests.ops.samples import SAMPLES, Sample

NO_KERNEL = {
    "attention-softmax_in_double": "the kernel's softmax is torch.float32; softmax_precision asks for another",
}
WITH_KERNEL = [s for s in SAMPLES if str(s).split("-")[0] in kernels.names() and "with_qk" not in str(s)]


def leaves(sample: Sample) -> list[Tensor | None]:
    args = [None if a is None else moved(a, DEVICE) for a in sample.args]
    return [a.detach().requires_grad_() if a is not None and a.is_floating_point() else a for a in args]


def outputs_and_gradients(sample: Sample) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    args = leaves(sample)
    outputs = sample.outputs(*args)
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outputs]
    gradients = torch.autograd.grad(outputs, [a for a in args if a is not None and a.requires_grad], grads)
    return tuple(output.detach() for output in outputs), gradients


def assert_close(ours: Tensor, theirs: Tensor, ulps: float) -> None:
    """To so many units in the last place of the largest element."""
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    if ours.numel() == 0:
        return
    bound = ulps * torch.finfo(theirs.dtype).eps * max(float(theirs.abs().max()), 1.0)
    assert float((ours - theirs).abs().max()) <= bound


@pytest.mark.parametrize("sample", WITH_KERNEL, ids=str)
def test_kernel(sample: Sample) -> None:
    sample = sample.cast(torch.float32) if "attention" in str(sample) else sample
    with use_kernels("never"):
        expected, expected_gradients = outputs_and_gradients(sample)
    with use_kernels("always") as declined:
        outputs, gradients = outputs_and_gradients(sample)
    assert [why for _, why in declined] == ([NO_KERNEL[str(sample)]] if str(sample) in NO_KERNEL else [])
    for ours, theirs in zip(outputs, expected, strict=True):
        assert ours.stride() == theirs.stride()
        assert_close(ours, theirs, 8)
    # A norm whose stash type is a 16-bit one: its composite rounds every step of the gradient to that.
    half_stash = sample.kwargs.get("stash_type") in (10, 16)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert_close(ours, theirs, 2**18 if half_stash else 24)


def test_second_gradients_are_the_textbooks() -> None:
    sample = next(s for s in SAMPLES if str(s) == "rms_norm-plain").cast(torch.float64)
    given = [a for a in leaves(sample) if a is not None]
    with use_kernels("always"):
        assert torch.autograd.gradgradcheck(lambda *floats: sample.outputs(*floats), given, fast_mode=True)


@pytest.mark.parametrize("name", ["rms_norm-plain", "rotary_embedding-3d_ids_interleaved", "attention-softcap_bias"])
def test_gradients_by_differences(name: str) -> None:
    sample = next(s for s in SAMPLES if str(s) == name).cast(torch.float64)
    args = leaves(sample)
    given = [a for a in args if a is not None and a.requires_grad]

    def call(*floats: Tensor) -> tuple[Tensor, ...]:
        rest = iter(floats)
        return sample.outputs(*(next(rest) if a is not None and a.requires_grad else a for a in args))

    with use_kernels("always") as declined:
        assert torch.autograd.gradcheck(call, given, fast_mode=True)
    assert not declined
