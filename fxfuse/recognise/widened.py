"""Tensors that a model keeps in few bits and reads in more: where a quantised model stops being small.

What makes the file computes such a thing once and writes the result, or whatever loads the file does, and holds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxfuse.graph.region import real_users
from fxfuse.graph.view import fake, is_float, op_name, tensor
from fxfuse.recognise.kept import FLOAT8, STORED, Kept, size_in_bytes

_SMALL = torch.ops.fxfuse.dequantize_linear.default
_FLOAT8_SMALL = "dequantize_affine_float8"
"""torchao's, which is translated as DequantizeLinear (`fxfuse.onnx.translate.quantised`)."""
LEAST = 1024
"""Bytes below which nothing is said: zero points, a row of a mask."""


@dataclass(frozen=True)
class Widened:
    """A kept tensor, and the first of floating point that is made of it."""

    kept: Node
    read: Node

    @property
    def sizes(self) -> str:
        """``"8192 bytes of int8 are kept, 32768 bytes of float32 are read"``"""
        parts = [
            f"{size_in_bytes(n)} bytes of {str(fake(n).dtype).removeprefix('torch.')} are {how}"
            for n, how in ((self.kept, "kept"), (self.read, "read"))
        ]
        return ", ".join(parts)


def widened(nodes: Sequence[Node], kept: Kept) -> Iterator[Widened]:
    """Every stored tensor of which a larger one of floating point is computed, of what is kept alone, and not by
    DequantizeLinear, which keeps it small."""
    for leaf in kept.stored(list(nodes), (*STORED, *FLOAT8)):
        if size_in_bytes(leaf) < LEAST:
            continue
        seen, stack = {leaf}, [leaf]
        while stack:
            for user in real_users(stack.pop()):
                if user in seen or tensor(user) is None or user not in kept:
                    continue
                seen.add(user)
                if not is_float(user) or fake(user).dtype in FLOAT8:
                    stack.append(user)
                elif (
                    user.target is not _SMALL
                    and op_name(user) != _FLOAT8_SMALL
                    and size_in_bytes(user) > size_in_bytes(leaf)
                ):
                    yield Widened(leaf, user)
