"""The decoding step as a graph of its own, for one token a row, and one weights file for it and the graph of prompts.

input_ids      [B, 1]           logits          [B, 1, vocabulary]
attention_mask [B, P + 1]       present, key    [B, H, P + 1, D]     of every layer, and value
position_ids   [B, 1]
past, key      [B, H, P, D]     of every layer, and value
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir

from fxfuse.decoder.choices import Names
from fxfuse.decoder.export import export_decoder

__all__ = ["export_step", "share_weights"]


def export_step(model: Any, *, names: Names = "genai", **options: Any) -> ir.Model:
    """The graph of `export_decoder` for one new token: no causal mask is left in it.

    Raises:
        FxfuseError: what `export_decoder` refuses.
    """
    return export_decoder(model, names=names, one_token=True, **options)


@contextmanager
def share_weights(program: ir.Model, saved: Path) -> Iterator[int]:
    """Within the block, initializers of `program` point into the weights file of `saved`, where they are equal.

    Yields:
        Bytes that are shared.
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
