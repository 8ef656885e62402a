"""What only a GPU can show: graphs of launches, other streams, more elements than 32 bits can count.

On a machine without one these tests are skipped; `python -m pytest tests/kernels tests/ops` runs them where there is
one, and `compute-sanitizer python -m pytest tests/kernels/test_samples.py` looks at every load and store.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxfuse.kernels.switch import use_kernels
from fxfuse.ops.calls import moved
from tests.kernels.device import DEVICE
from tests.kernels.test_samples import NO_KERNEL, WITH_KERNEL
from tests.ops.samples import Sample

pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
# What is expanded cannot be written new numbers into.
KERNELS = [s for s in WITH_KERNEL if str(s) not in (*NO_KERNEL, "rotary_embedding-expanded_cache")]


def on_device(sample: Sample) -> list[Tensor | None]:
    return [None if a is None else moved(a, DEVICE) for a in sample.args]


def redrawn(args: list[Tensor | None]) -> list[Tensor | None]:
    """Other numbers in tensors of the same kind; positions, lengths and masks as they were."""
    return [torch.randn_like(a) if a is not None and a.is_floating_point() else a for a in args]


@pytest.mark.parametrize("sample", KERNELS, ids=str)
def test_a_cuda_graph_replays_on_new_numbers(sample: Sample) -> None:
    args = on_device(sample)
    fresh = redrawn(args)
    with use_kernels("always"):
        expected = sample.outputs(*fresh)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiled before it is captured
            sample.outputs(*args)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = sample.outputs(*args)
    for kept, new in zip(args, fresh, strict=True):
        if kept is not None and new is not None:
            kept.copy_(new)
    graph.replay()
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)


@pytest.mark.parametrize("sample", KERNELS, ids=str)
def test_the_current_stream_is_the_one(sample: Sample) -> None:
    """The inputs come late on a stream of their own: a launch anywhere else would read the old numbers."""
    args = on_device(sample)
    fresh = redrawn(args)
    with use_kernels("always"):
        expected = sample.outputs(*fresh)
        sample.outputs(*args)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            for kept, new in zip(args, fresh, strict=True):
                if kept is not None and new is not None:
                    kept.copy_(new)
            outputs = sample.outputs(*args)
        stream.synchronize()
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)


def test_more_elements_than_32_bits_count() -> None:
    """The last rows of 4 GiB are what the same rows are alone."""
    rows, hidden = 2**31 // 4096 + 8, 4096
    x = torch.empty(rows, hidden, dtype=torch.bfloat16, device=DEVICE).normal_()
    w = torch.randn(hidden, device=DEVICE, dtype=torch.bfloat16)
    angles = torch.randn(1, rows, 64, device=DEVICE, dtype=torch.bfloat16)
    with use_kernels("always") as declined:
        assert torch.equal(torch.ops.fxfuse.rms_norm(x, w)[-8:], torch.ops.fxfuse.rms_norm(x[-8:], w))
        turned = torch.ops.fxfuse.rotary_embedding(x.unsqueeze(0), angles, angles, num_heads=32)
        alone = torch.ops.fxfuse.rotary_embedding(x[None, -8:], angles[:, -8:], angles[:, -8:], num_heads=32)
        assert torch.equal(turned[:, -8:], alone)
        del turned
        cache = x.view(1, 1, rows, hidden)
        start = torch.tensor([rows - 8], device=DEVICE)
        written = torch.ops.fxfuse.tensor_scatter(cache, cache[:, :, :8], start)
        assert torch.equal(written[0, 0, -8:], x[:8])
        q = x[: 2**10].view(1, 2**10, 32, 128).transpose(1, 2)
        k = x.view(1, -1, 32, 128).transpose(1, 2)
        long = torch.ops.fxfuse.attention(q, k, k, nonpad_kv_seqlen=torch.tensor([2**10], device=DEVICE))
        short = torch.ops.fxfuse.attention(q, k[:, :, : 2**10], k[:, :, : 2**10])
        torch.testing.assert_close(long, short, rtol=0, atol=1e-2)
    assert not declined
