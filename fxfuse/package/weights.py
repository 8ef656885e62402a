"""One weights file for two graphs of one model: the second graph's weights are looked up in the first one's file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir


@contextmanager
def share_weights(program: ir.Model, saved: Path) -> Iterator[int]:
    """Within the block, weights of `program` that a saved model has too are read from that model's weights file, so
    that `program`, saved within the block beside it, refers to that file and holds no copy.

    Args:
        program: a graph of the same model. It is as it was when the block ends.
        saved: the ONNX file of the model that is saved already, with its weights in a file of their own.

    Yields:
        How many bytes are shared.
    """
    stored = {
        _digest(value.const_value): value.const_value
        for value in ir.load(saved).graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    before = {name: value.const_value for name, value in program.graph.initializers.items()}
    shared = 0
    try:
        for name, value in program.graph.initializers.items():
            if value.const_value is None or (there := stored.get(_digest(value.const_value))) is None:
                continue
            value.const_value = ir.ExternalTensor(
                there.location,
                there.offset,
                there.length,
                there.dtype,
                shape=ir.Shape(list(there.shape)),
                name=name,
                base_dir=saved.parent,
            )
            shared += there.nbytes
        yield shared
    finally:
        for name, value in program.graph.initializers.items():
            value.const_value = before[name]


def _digest(tensor: ir.TensorProtocol) -> tuple[object, ...]:
    return tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).digest()
