"""`fxfuse.pattern`: an example, its operator and the operator's translations, checked and registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxfuse.errors import FxfuseError
from fxfuse.ops.outside import OutsideOp, check_translation, overload_of
from fxfuse.recognise.by_example.example import Example
from fxfuse.recognise.catalogue import register
from fxfuse.torch_seams import OpOverload

_NOT_THEIRS = frozenset(["aten", "prim", "prims", "fxfuse", "higher_order", "onnx"])
"""Namespaces whose operators have their translations and decompositions already."""


def pattern(
    *,
    replacement: Callable[..., Any],
    operator: str | None = None,
    ulp: float = 4.0,
    onnx: Callable[..., Any] | None = None,
    decomposition: Callable[..., Any] | None = None,
    check: Callable[..., str | None] | None = None,
) -> Callable[[Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]], Example]:
    """Register a pattern by example; see the module. Give `patterns=[...]` to `fuse` to use only some.

    Args:
        replacement: an op or function that takes the example's arguments and computes the same; of several results,
            all of them, in the same order.
        operator: what the report calls it.
        ulp: bound on the difference in the region's own dtype, in units in the last place.
        onnx: what the replacement, an operator of your own, is in ONNX. An onnxscript function with a domain of its
            own (``@script(Opset("my.domain", 1), default_opset=opset23)``) stays one node of that domain, and the
            model carries the function; any other callable is given onnxscript values and writes operators, as in
            torch.onnx's ``custom_translation_table``. Every door to ONNX, the plugin included, knows it from then on.
            None: the caller has to give torch.onnx a translation.
        decomposition: what `fxfuse.unfuse` writes the operator out as, with the operator's arguments; the example by
            default. Proven with the replacement.
        check: called with the example's arguments, fake tensors (shape, dtype, device; no values; sizes may be
            symbols, which it must not ask about) and numbers. What it returns, if not None, is why the region is left
            as it is; the report gives it as a near miss.

    Returns:
        The example, which can still be called; its `unregister()` takes back everything.

    Raises:
        FxfuseError: the example's signature cannot be bound, something given cannot be called, or `onnx` or
            `decomposition` is given for what is no operator of your own.
    """
    if not callable(replacement):
        raise FxfuseError(f"the replacement cannot be called: {replacement!r}", where="replacement")

    def decorate(function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]) -> Example:
        where = f"pattern {getattr(function, '__name__', function)}"
        if onnx is not None:
            check_translation(onnx, where)
        for name, given in (("decomposition", decomposition), ("check", check)):
            if given is not None and not callable(given):
                raise FxfuseError(f"{name}= cannot be called: {given!r}", where=where)
        overload = _own(replacement)
        if overload is None and (onnx is not None or decomposition is not None):
            raise FxfuseError(
                f"onnx= and decomposition= are of an operator of your own, and the replacement is {replacement!r}",
                where=where,
                hint="define one with torch.library.custom_op and give it as replacement",
            )
        example = Example(function, replacement, operator, ulp, decomposition=decomposition, check=check)
        if overload is not None:
            example.entry = OutsideOp(overload, decomposition or function, onnx)
        register(example)
        return example

    return decorate


def _own(replacement: object) -> OpOverload | None:
    """The operator, if it is one, and neither PyTorch's nor fxfuse's."""
    overload = overload_of(replacement)
    return None if overload is None or overload.namespace in _NOT_THEIRS else overload
