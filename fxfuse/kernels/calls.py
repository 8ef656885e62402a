"""The kernels by the operator's name, taking what the operator takes. Imports Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fxfuse.kernels import attention, rms_norm, rotary_embedding, tensor_scatter
from fxfuse.ops import attention as attention_op
from fxfuse.ops import rms_norm as rms_norm_op
from fxfuse.ops import rotary_embedding as rotary_embedding_op
from fxfuse.ops import tensor_scatter as tensor_scatter_op
from fxfuse.ops.attention_arguments import Attributes, Inputs
from fxfuse.ops.attention_math import Problem
from fxfuse.ops.registry import onnx_float


class Kernel(NamedTuple):
    """One operator's kernel."""

    unsupported: Callable[..., str | None]
    """Checks the arguments as the operator does, then says why the kernel does not take them, or None."""
    function: Callable[..., Any]
    """What the operator gives, for arguments that were checked."""


def rms_norm_unsupported(X: Tensor, scale: Tensor, **attributes: Any) -> str | None:
    rms_norm_op.check(X, scale, attributes.get("axis", -1))
    onnx_float(attributes.get("stash_type", 1), "stash_type")
    return rms_norm.unsupported(X, scale, **attributes)


def rotary_embedding_unsupported(
    X: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> None:
    """It takes all of them."""
    rotary_embedding_op.check(X, cos_cache, sin_cache, position_ids, interleaved, num_heads, rotary_embedding_dim)


def tensor_scatter_unsupported(
    past_cache: Tensor, update: Tensor, write_indices: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> str | None:
    tensor_scatter_op.check(past_cache, update, write_indices, axis, mode)
    return tensor_scatter.unsupported(past_cache)


def attention_kernel(count: int) -> Kernel:
    """Attention with its first `count` outputs: Y, or Y, present_key and present_value."""

    def unsupported(*inputs: Tensor | None, **attributes: Any) -> str | None:
        i, a = Inputs(*inputs), Attributes(**attributes)  # type: ignore[arg-type]
        return attention.unsupported(i, a, attention_op.checked(i, a, count))

    def forward(*inputs: Tensor | None, **attributes: Any) -> Any:
        i, a = Inputs(*inputs), Attributes(**attributes)  # type: ignore[arg-type]
        sizes = attention_op.checked(i, a, count)
        if count == 1:
            return attention.forward(i, a, sizes)
        present = attention_op.keys_and_values(i, a, sizes, fresh=True)
        return attention.forward(i, a, sizes, present), *present

    return Kernel(unsupported, forward)


def attention_backward_unsupported(Q: Tensor, K: Tensor, V: Tensor, *rest: Any, **attributes: Any) -> str | None:
    return attention.too_wide(max(Q.shape[3], V.shape[3]), Q.dtype)


def attention_backward(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    grad: Tensor,
    *,
    offset: int,
    is_causal: int,
    scale: float | None,
    softcap: float,
    mask_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p = Problem(Q, K, V, mask, lengths, offset)
    a = Attributes(is_causal=is_causal, scale=scale, softcap=softcap)
    return attention.gradients(p, a, grad, mask_gradient=mask_gradient)


def rms_norm_backward_unsupported(grad: Tensor, X: Tensor, scale: Tensor, **attributes: Any) -> str | None:
    return rms_norm.unsupported(X, scale, **attributes)


KERNELS = {
    "rms_norm": Kernel(rms_norm_unsupported, rms_norm.forward),
    "rotary_embedding": Kernel(rotary_embedding_unsupported, rotary_embedding.forward),
    "tensor_scatter": Kernel(tensor_scatter_unsupported, tensor_scatter.forward),
    "attention": attention_kernel(1),
    "attention_with_present": attention_kernel(3),
}
"""The operators' kernels."""

BACKWARD = {
    "rms_norm_backward": Kernel(rms_norm_backward_unsupported, rms_norm.backward),
    "rotary_embedding_backward": Kernel(lambda *args, **kwargs: None, rotary_embedding.backward),
    "attention_backward": Kernel(attention_backward_unsupported, attention_backward),
}
"""Those of the backward passes (`fxfuse.ops.registry.define_backward`)."""
