"""Operators of other packages that patterns put into graphs: what they are in ONNX, and in ATen.

`fxfuse.pattern(replacement=…, onnx=…, decomposition=…)` enters them here. `translation_table` and `decompositions` of
`fxfuse.ops` give them beside fxfuse's own, so every door to ONNX and `fxfuse.unfuse` know them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fxfuse.errors import FxfuseError
from fxfuse.torch_seams import OpOverload, custom_name


@dataclass(frozen=True, eq=False)
class OutsideOp:
    """An operator that somebody else defined."""

    overload: OpOverload
    """The operator, as it stands in a graph."""
    decomposition: Callable[..., Any]
    """The same computation in ATen operators; takes what the operator takes."""
    onnx: Callable[..., Any] | None = None
    """Its translation: an onnxscript function (``@script``) with a domain of its own, or a function of onnxscript
    values, as torch.onnx's ``custom_translation_table`` takes it. None: torch.onnx has to know it."""

    @property
    def function(self) -> Any:
        """The onnxscript function that it becomes a call of, if it is one; else None."""
        return self.onnx if _is_script(self.onnx) else None

    @property
    def written_out(self) -> Callable[..., Any] | None:
        """Its translation into operators, without a function: torch.onnx inlines every function that it meets, and
        fails where one was written for another opset than the export's."""
        if self.function is None:
            return self.onnx
        body = self.function.function

        @functools.wraps(body)
        def inlined(*args: Any, **kwargs: Any) -> Any:
            return body(*args, **kwargs)

        return inlined


_ENTERED: list[OutsideOp] = []
"""One entry a pattern, in the order in which they were registered. Of the same operator the last one holds."""


def enter(op: OutsideOp) -> None:
    """From now on `translation_table` and `decompositions` have this operator."""
    _ENTERED[:] = [*(known for known in _ENTERED if known is not op), op]


def withdraw(op: OutsideOp) -> None:
    """They have it no more; an earlier entry of the same operator holds again."""
    _ENTERED[:] = [known for known in _ENTERED if known is not op]


def outside() -> dict[OpOverload, OutsideOp]:
    """Every operator that was entered, by the overload that stands in a graph."""
    return {op.overload: op for op in _ENTERED}


def overload_of(replacement: object) -> OpOverload | None:
    """The operator that a call of `replacement` puts into a graph; None where it is no operator but a function."""
    name = custom_name(replacement)
    if name is not None:
        namespace, _, operator = name.partition("::")
        replacement = getattr(getattr(torch.ops, namespace), operator)
    if isinstance(replacement, OpOverload):
        return replacement
    overload = getattr(replacement, "default", None)  # of torch.ops.mine.geglu, which has that one and maybe others
    return overload if isinstance(overload, OpOverload) else None


def check_translation(onnx: object, where: str) -> None:
    """Raises FxfuseError if it is no translation to ONNX."""
    if not callable(onnx):
        raise FxfuseError(
            f"onnx= cannot be called: {onnx!r}",
            where=where,
            hint="an onnxscript function (@script in a domain of your own), or a function of onnxscript values as "
            "torch.onnx's custom_translation_table takes it",
        )
    if _is_script(onnx) and getattr(onnx, "opset").domain == "":  # noqa: B009
        raise FxfuseError(
            "an onnxscript function needs a domain of its own, not ONNX's",
            where=where,
            hint='@script(onnxscript.values.Opset("my.domain", 1), default_opset=opset23)',
        )


def _is_script(onnx: object) -> bool:
    """Is it an onnxscript function that has a body in ONNX?"""
    if onnx is None:
        return False
    try:
        from onnxscript import OnnxFunction
    except ImportError:
        return False
    return isinstance(onnx, OnnxFunction)
