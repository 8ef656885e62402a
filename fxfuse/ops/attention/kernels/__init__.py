"""The attention kernels by the operator's name, taking what the operator takes. Imports Triton."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxfuse.kernels.table import Kernel
from fxfuse.ops.attention import checked, keys_and_values
from fxfuse.ops.attention.arguments import Attributes, Inputs
from fxfuse.ops.attention.kernels import launching
from fxfuse.ops.attention.math import Problem


def kernel(count: int) -> Kernel:
    """Attention with its first `count` outputs: Y, or Y, present_key and present_value."""

    def unsupported(*inputs: Tensor | None, **attributes: Any) -> str | None:
        i, a = Inputs(*inputs), Attributes(**attributes)  # type: ignore[arg-type]
        return launching.unsupported(i, a, checked(i, a, count))

    def forward(*inputs: Tensor | None, **attributes: Any) -> Any:
        i, a = Inputs(*inputs), Attributes(**attributes)  # type: ignore[arg-type]
        sizes = checked(i, a, count)
        if count == 1:
            return launching.forward(i, a, sizes)
        present = keys_and_values(i, a, sizes, fresh=True)
        return launching.forward(i, a, sizes, present), *present

    return Kernel(unsupported, forward)


def backward_unsupported(Q: Tensor, K: Tensor, V: Tensor, *rest: Any, **attributes: Any) -> str | None:
    return launching.too_wide(max(Q.shape[3], V.shape[3]), Q.dtype)


def backward(
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
    return launching.gradients(p, a, grad, mask_gradient=mask_gradient)


KERNELS = {
    "attention": kernel(1),
    "attention_with_present": kernel(3),
    "attention_backward": Kernel(backward_unsupported, backward),
}
