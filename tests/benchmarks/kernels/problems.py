"""What is measured: the shapes of each operator, and all that computes the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fxfuse.ops
from fxfuse import kernels
from fxfuse.kernels.switch import use_kernels
from fxfuse.ops import attention as attention_op
from fxfuse.ops import rms_norm as rms_norm_op
from fxfuse.ops import rotary_embedding as rotary_op

assert fxfuse.ops.OPS
ops = torch.ops.fxfuse
Run = Callable[[], Any]

FULL = "all"
TOKENS = {FULL: (1, 8, 64, 512, 1024, 4096, 16384, 32768), "some": (64, 4096)}
HIDDEN = {FULL: (2048, 4096, 8192, 16384), "some": (4096,)}
LENGTHS = {FULL: (512, 2048, 8192, 16384), "some": (2048,)}


@dataclass
class Problem:
    """One shape of one operator."""

    op: str
    shape: dict[str, int]
    dtype: torch.dtype
    runs: dict[str, Run] = field(repr=False)
    """The implementations: ``"fxfuse"`` is what the operator runs, ``"composite"`` what all are checked with."""
    bytes: int = 0
    """What has to be read and written, once; 0 where arithmetic is what takes the time."""
    tolerance: float = 2e-2
    """How far implementations may be apart, relative to the largest element."""


def compiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Run:
    """The unfused code under torch.compile, in one graph."""
    # All problems share this lambda's code, and after eight shapes of one code Dynamo would give up compiling it.
    torch.compiler.reset()
    made: Run = torch.compile(lambda: function(*args, **kwargs), dynamic=False, fullgraph=True)
    return made


def without_kernels(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Run:
    def run() -> Any:
        with use_kernels("never"):
            return function(*args, **kwargs)

    return run


def rms_norm(sizes: str, device: torch.device) -> Iterator[Problem]:
    for dtype in (torch.bfloat16, torch.float16):
        for hidden in HIDDEN[sizes]:
            for tokens in TOKENS[sizes]:
                x = torch.randn(tokens, hidden, device=device, dtype=dtype)
                w = torch.randn(hidden, device=device, dtype=dtype)
                runs: dict[str, Run] = {
                    "fxfuse": lambda x=x, w=w: ops.rms_norm(x, w, epsilon=1e-6),
                    "composite": without_kernels(ops.rms_norm, x, w, epsilon=1e-6),
                    "torch.compile": compiled(rms_norm_op.decomposition, x, w, epsilon=1e-6),
                    "F.rms_norm": lambda x=x, w=w: F.rms_norm(x, w.shape, w, 1e-6),
                    "Liger": lambda x=x, w=w: liger_rms_norm(x, w),
                }
                yield Problem("rms_norm", {"tokens": tokens, "hidden": hidden}, dtype, runs, 2 * x.nbytes + w.nbytes)


def rms_norm_training(sizes: str, device: torch.device) -> Iterator[Problem]:
    for hidden in HIDDEN[sizes]:
        for tokens in TOKENS[sizes]:
            x, g = (torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16) for _ in range(2))
            x.requires_grad_()
            w = torch.randn(hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
            step = compiled(rms_norm_op.decomposition, x, w, epsilon=1e-6)
            runs: dict[str, Run] = {
                "fxfuse": lambda x=x, w=w, g=g: torch.autograd.grad(ops.rms_norm(x, w, epsilon=1e-6), (x, w), g),
                "composite": without_kernels(
                    lambda x=x, w=w, g=g: torch.autograd.grad(ops.rms_norm(x, w, epsilon=1e-6), (x, w), g)
                ),
                "torch.compile": lambda x=x, w=w, g=g, step=step: torch.autograd.grad(step(), (x, w), g),
                "F.rms_norm": lambda x=x, w=w, g=g: torch.autograd.grad(F.rms_norm(x, w.shape, w, 1e-6), (x, w), g),
                "Liger": lambda x=x, w=w, g=g: torch.autograd.grad(liger_rms_norm(x, w), (x, w), g),
            }
            shape = {"tokens": tokens, "hidden": hidden}
            # Forward: x and y; backward: x, g and grad_x.
            yield Problem("rms_norm training", shape, torch.bfloat16, runs, 5 * x.nbytes)


def rotary_embedding(sizes: str, device: torch.device) -> Iterator[Problem]:
    heads, size = 32, 128
    for dtype in (torch.bfloat16, torch.float16):
        for interleaved in (0, 1):
            for tokens in TOKENS[sizes]:
                x = torch.randn(1, tokens, heads * size, device=device, dtype=dtype)
                turn = 6.3 * torch.rand(1, tokens, size // 2, device=device)
                cos, sin = turn.cos().to(dtype), turn.sin().to(dtype)
                kwargs = {"num_heads": heads, "interleaved": interleaved}
                runs: dict[str, Run] = {
                    "fxfuse": lambda x=x, c=cos, s=sin, k=kwargs: ops.rotary_embedding(x, c, s, **k),
                    "composite": without_kernels(ops.rotary_embedding, x, cos, sin, **kwargs),
                    "torch.compile": compiled(rotary_op.decomposition, x, cos, sin, **kwargs),
                }
                if not interleaved:
                    runs["Liger"] = liger_rotary(x, cos, sin, heads)
                shape = {"tokens": tokens, "heads": heads, "head size": size, "interleaved": interleaved}
                yield Problem("rotary_embedding", shape, dtype, runs, 2 * x.nbytes + cos.nbytes + sin.nbytes)


def attention(sizes: str, device: torch.device) -> Iterator[Problem]:
    """Prefill and decode of a grouped-query model: causal, with a soft-cap, and from a cache of ragged lengths."""
    hq, hkv, size = 32, 8, 128
    half = {"device": device, "dtype": torch.bfloat16}
    for length in LENGTHS[sizes]:
        q = torch.randn(1, hq, length, size, **half)
        k, v = (torch.randn(1, hkv, length, size, **half) for _ in range(2))
        for option, kwargs in {"causal": {}, "softcap causal": {"softcap": 50.0}}.items():
            given: dict[str, Any] = {"is_causal": 1, **kwargs}
            runs = attention_runs((q, k, v), given)
            if option == "causal":
                runs |= sdpa_backends(q, k, v)
            yield Problem(f"attention, {option}", {"length": length}, torch.bfloat16, runs)
        cache_k, cache_v = (torch.randn(16, hkv, length, size, **half) for _ in range(2))
        filled = torch.linspace(1, length, 16, device=device).long()
        one = torch.randn(16, hq, 1, size, **half)
        args = (one, cache_k, cache_v, None, None, None, filled)
        runs = attention_runs(args, {"is_causal": 1})
        yield Problem("attention, ragged decode", {"length": length, "batch": 16}, torch.bfloat16, runs)


def attention_runs(args: tuple[Tensor | None, ...], kwargs: dict[str, Any]) -> dict[str, Run]:
    return {
        "fxfuse": lambda: ops.attention(*args, **kwargs),
        "our kernel": lambda: kernels.run("attention", *args, **kwargs),
        "composite": without_kernels(ops.attention, *args, **kwargs),
        "torch.compile": compiled(attention_op.decomposition(1), *args, **kwargs),
    }


def sdpa_backends(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Run]:
    """SDPA, its backends one by one."""

    def run(backend: SDPBackend) -> Run:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return call

    names = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    names |= {"cuDNN": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
    return {f"SDPA {name}": run(backend) for name, backend in names.items()}


def tensor_scatter(sizes: str, device: torch.device) -> Iterator[Problem]:
    for length in LENGTHS[sizes]:
        cache = torch.randn(16, 8, length, 128, device=device, dtype=torch.bfloat16)
        new = torch.randn(16, 8, 1, 128, device=device, dtype=torch.bfloat16)
        at = torch.arange(16, device=device)
        runs: dict[str, Run] = {
            "fxfuse": lambda c=cache, n=new, a=at: ops.tensor_scatter(c, n, a),
            "composite": without_kernels(ops.tensor_scatter, cache, new, at),
        }
        yield Problem("tensor_scatter", {"length": length}, torch.bfloat16, runs, 2 * cache.nbytes)


def liger_rms_norm(x: Tensor, w: Tensor) -> Any:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False)


def liger_rotary(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Run:
    """Liger rotates q and k in place, in [B, H, S, D] and with caches of full width; k is one head here."""
    B, S, hidden = x.shape
    q = x.clone().view(B, S, heads, hidden // heads).transpose(1, 2)
    k = q[:, :1].clone()
    caches = [torch.cat((cache, cache), -1) for cache in (cos, sin)]

    def run() -> Any:
        from liger_kernel.ops.rope import LigerRopeFunction

        return LigerRopeFunction.apply(q, k, *caches)[0].transpose(1, 2).flatten(2)

    return run


PROBLEMS: dict[str, Callable[[str, torch.device], Iterator[Problem]]] = {
    "rms_norm": rms_norm,
    "rms_norm training": rms_norm_training,
    "rotary_embedding": rotary_embedding,
    "attention": attention,
    "tensor_scatter": tensor_scatter,
}
