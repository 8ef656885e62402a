"""The backward pass of Attention on CUDA: PyTorch's SDPA where it has a fused kernel, ours where it has none.

    attention_backward   the gradients of Q, K, V and the mask, for heads split and the past joined on

The textbook's gradients (`math.gradients`) hold the Sq × T weights in memory; neither of the two does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxfuse.kernels.switch import kernels_forced
from fxfuse.ops.attention import math as math_
from fxfuse.ops.attention.arguments import Attributes, Maybe
from fxfuse.ops.attention.math import Problem
from fxfuse.ops.attention.sdpa import has_fused_kernel
from fxfuse.ops.outputs import as_laid_out
from fxfuse.ops.registry import define_backward

SCHEMA = (
    "(Tensor Q, Tensor K, Tensor V, Tensor? mask, Tensor? lengths, Tensor grad, *, "
    "int offset, int is_causal, float? scale, float softcap, bool mask_gradient) -> (Tensor, Tensor, Tensor, Tensor)"
)

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def fast_gradients(p: Problem, a: Attributes, grad: Tensor, mask_gradient: bool) -> Gradients:
    """The gradients of Q, K, V [B, H, S, ..] and of the mask's full form [B, Hq, Sq, T] (empty if not asked for).

    Args:
        p: the call.
        a: its attributes.
        grad: Y's gradient, [B, Hq, Sq, Dv].
        mask_gradient: is the mask's wanted?
    """
    if not (mask_gradient or kernels_forced()) and has_fused_kernel(p, a, p.K.shape[2]):
        return sdpa_gradients(p, a, grad)
    outputs: Gradients = torch.ops.fxfuse.attention_backward(
        *p[:5], grad, offset=p.offset, is_causal=a.is_causal, scale=a.scale, softcap=a.softcap,
        mask_gradient=mask_gradient,
    )  # fmt: skip
    return outputs


def sdpa_gradients(p: Problem, a: Attributes, grad: Tensor) -> Gradients:
    """By SDPA's own backward pass, after running it forward again: its statistics are no output of our operator."""
    Q, K, V = leaves = [tensor.detach().requires_grad_() for tensor in (p.Q, p.K, p.V)]
    with torch.enable_grad():
        y = math_.sdpa(p._replace(Q=Q, K=K, V=V), a)
    grad_Q, grad_K, grad_V = torch.autograd.grad(y, leaves, grad)
    return grad_Q, grad_K, grad_V, p.Q.new_empty(0)


def composite(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    mask: Maybe,
    lengths: Maybe,
    grad: Tensor,
    *,
    offset: int,
    is_causal: int,
    scale: float | None,
    softcap: float,
    mask_gradient: bool,
) -> Gradients:
    p = Problem(Q, K, V, mask, lengths, offset)
    a = Attributes(is_causal=is_causal, scale=scale, softcap=softcap)
    grad_Q, grad_K, grad_V, grad_mask = math_.gradients(p, a, grad, None)
    return (
        as_laid_out(grad_Q.to(Q.dtype), (0, 2, 1, 3)),
        as_laid_out(grad_K.to(Q.dtype)),
        as_laid_out(grad_V.to(Q.dtype)),
        as_laid_out(grad_mask) if mask_gradient else Q.new_empty(0, dtype=grad_mask.dtype),
    )


def fake(
    Q: Tensor, K: Tensor, V: Tensor, mask: Maybe, lengths: Maybe, grad: Tensor, *, mask_gradient: bool, **_: object
) -> Gradients:
    B, Hq, Sq, _D = Q.shape
    wide = torch.promote_types(Q.dtype, torch.float32)
    return (
        torch.empty_permuted(Q.shape, (0, 2, 1, 3), dtype=Q.dtype, device=Q.device),
        K.new_empty(K.shape),
        V.new_empty(V.shape),
        Q.new_empty((B, Hq, Sq, K.shape[2]) if mask_gradient else (0,), dtype=wide),
    )


define_backward("attention_backward", SCHEMA, composite=composite, fake=fake, kernels="fxfuse.ops.attention.kernels")
