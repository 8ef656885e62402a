"""What one eager forward pass of a model runs: the operators that should be found in its exported graph."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ROTATION = re.compile(r"^_?apply_.*(rotary|rope)")


class _Attentions(TorchFunctionMode):
    """Counts calls of SDPA, and softmaxes over scores [..., S, T]: what attention is when it is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.found += 1
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "softmax" and isinstance(result, Tensor) and result.dim() >= 3:
            self.found += result.shape[-1] >= result.shape[-2] > 1
        return result


def executed(model: nn.Module, *inputs: Tensor) -> tuple[int, int, int]:
    """RMSNorms, rotated tensors and attentions of one call: modules named so, `apply_rotary…`, SDPA or softmaxes."""
    norms = rotations = 0

    def norm(*_: Any) -> None:
        nonlocal norms
        norms += 1

    def rotated(result: Any) -> None:
        nonlocal rotations
        rotations += len(result) if isinstance(result, tuple) else 1

    named = [m for m in model.modules() if re.search("RMSNorm|RmsNorm|L2Norm", type(m).__name__)]
    hooks = [module.register_forward_hook(norm) for module in named]
    try:
        with torch.no_grad(), _Attentions() as attentions, _listening(rotated):
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return norms, rotations, attentions.found


@contextmanager
def _listening(heard: Callable[[Any], None]) -> Iterator[None]:
    """Within, `heard` gets what each function of transformers that rotates returns."""

    def telling(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def told(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            heard(result)
            return result

        return told

    modules = [m for name, m in list(sys.modules.items()) if name.startswith("transformers.models.")]
    with ExitStack() as stack:
        for module in modules:
            for name, function in list(vars(module).items()):
                if _ROTATION.match(name) and callable(function):
                    stack.enter_context(mock.patch.object(module, name, telling(function)))
        yield
