"""Looking at an operator's arguments: sizes that may be symbols, types by ONNX's numbers, messages that name them."""

from __future__ import annotations

from typing import NoReturn

import torch

from fxfuse.errors import FxfuseError


def refuse(what: str, where: str, hint: str | None = None) -> NoReturn:
    """Raise FxfuseError; `where` names the argument."""
    raise FxfuseError(what, where=where, hint=hint)


# Sizes can be symbols, which type checkers take for ints. What is not known of a symbol must not be asked of it
# either: the answer would be a guard on the program's input.


def differ(a: int, b: int) -> bool:
    """Are the sizes known to differ?"""
    return a != b if type(a) is type(b) is int else _known(a != b)


def equal(a: int, b: int) -> bool:
    """Are the sizes known to be equal?"""
    return a == b if type(a) is type(b) is int else _known(a == b)


def exceeds(a: int, b: int) -> bool:
    """Is `a` known to be larger than `b`?"""
    return a > b if type(a) is type(b) is int else _known(a > b)


def _known(condition: bool) -> bool:
    from fxfuse.torch_seams import statically_known_true

    return statically_known_true(condition)


def show(tensor: torch.Tensor) -> str:
    """A tensor's shape, for messages."""
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


ONNX_FLOATS = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}
"""ONNX's numbers (TensorProto.DataType) of the floating-point types that `stash_type` and the like can name."""
DOUBLE = 11
"""float64 among them: the default stash_type, 1, would round a float64 model to float32."""


def onnx_float(number: int, where: str) -> torch.dtype:
    if number not in ONNX_FLOATS:
        refuse(f"{number} is no ONNX floating-point type; known are {list(ONNX_FLOATS)}", where)
    return ONNX_FLOATS[number]
