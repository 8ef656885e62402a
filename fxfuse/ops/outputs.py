"""What operators give: tensors laid out as their fake implementation promises, and the outputs of one ONNX node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def as_laid_out(tensor: torch.Tensor, order: Sequence[int] | None = None) -> torch.Tensor:
    """`tensor`, its memory in `order` of the dims (default: contiguous), copied only if it must be.

    A fake implementation promises strides; sizes of 1 make that more than `contiguous()`, which leaves the
    strides of such dims as they came.
    """
    order = range(tensor.dim()) if order is None else order
    target = torch.empty_permuted(tensor.shape, tuple(order), dtype=tensor.dtype, device=tensor.device)
    if tensor.stride() == target.stride():
        return tensor
    return target.copy_(tensor)


def one_node(operator: Callable[..., Any], inputs: Sequence[Any], attributes: dict[str, Any], defaults: Any) -> Any:
    """What `operator` of an onnxscript opset returns: the outputs of one node.

    Inputs that are None at the end are left out, and so are attributes at their default, which torch's recorder
    would write down.
    """
    while inputs[-1] is None:
        inputs = inputs[:-1]
    given = {name: value for name, value in attributes.items() if value != defaults[name]}
    outputs = operator(*inputs, **given)
    node = (outputs[0] if isinstance(outputs, Sequence) else outputs).producer()
    for name in set(node.attributes) - set(given):
        del node.attributes[name]
    return outputs
