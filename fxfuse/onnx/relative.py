"""Does a rotation tell distances only? Of queries and keys at any places, their product then depends on the difference.

Source: Su et al., RoFormer, https://arxiv.org/abs/2104.09864, 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


def not_relative(graph: ir.Graph, places: ir.Value, found: Sequence[ir.Value], count: int) -> str | None:
    """How cos and sin at places 0, 1, … are not powers of one rotation, perhaps scaled; None: they are."""
    from onnx.reference import ReferenceEvaluator

    part = ir.convenience.extract(graph, [places], found)
    run = ReferenceEvaluator(ir.to_proto(ir.Model(part, ir_version=10)))
    row = np.arange(max(count, 2))
    try:
        results: Any = run.run(None, {part.inputs[0].name or "": np.stack([row, row[::-1]])})
    except Exception as error:  # whatever numpy raises
        return f"it cannot be had at {len(row)} places: {type(error).__name__}: {error}"
    cos, sin = (np.asarray(result, np.float64) for result in results)
    turn = cos + 1j * sin
    # An angle in float32 is off by its last bits; cos and sin of two bytes are off by theirs.
    close = (1e-3 + 1e-7 * len(row) if results[0].dtype.itemsize > 2 else 3e-2) * np.abs(turn[0, 0])
    if turn.shape[:2] != (2, len(row)) or np.any(np.abs(turn[0] - turn[1, ::-1]) > close):
        return "a place is turned otherwise in other company"
    z, half = turn[0], turn[0, : (len(row) + 1) // 2]
    steps, doubles = z[1:] * z[0] - z[:-1] * z[1], z[::2] * z[0] - half**2
    if any(np.any(np.abs(off) > close * np.abs(z[0])) for off in (steps, doubles)):
        return "two places at one distance are turned apart by another angle elsewhere"
    return None
