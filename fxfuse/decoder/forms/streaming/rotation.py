"""Whether a rotation tells nothing but distances: then the product of a rotated query and a rotated key depends on the
difference of their places alone, and all places may be moved together.

Source: Su et al., RoFormer, https://arxiv.org/abs/2104.09864, 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

Table = tuple[np.ndarray, np.ndarray]


def rotation_table(graph: ir.Graph, places: Sequence[ir.Value], found: Sequence[ir.Value], count: int) -> Table | str:
    """cos and sin [count, D/2] at the places 0 to count - 1; or, as a text, why they tell more than distances.

    The part of the graph that computes them is run at those places, forwards and backwards. They tell distances only if
    place p is turned by the p-th power of one rotation, for each pair of features, perhaps times a common factor.

    Args:
        places: the inputs int64 [B, S] or [B, 1] that cos and sin are computed from; each is given the same numbers.
        found: cos and sin as the graph has them, [B, S, D/2].

    Raises:
        ValueError: they are computed from other inputs besides (of onnx_ir).
    """
    from onnx.reference import ReferenceEvaluator

    part = ir.convenience.extract(graph, list(places), found)
    run = ReferenceEvaluator(ir.to_proto(ir.Model(part, ir_version=10)))
    row = np.arange(max(count, 2))
    rows = np.stack([row, row[::-1]])
    shape = places[0].shape
    given = rows.reshape(-1, 1) if shape is not None and shape[1] == 1 else rows
    try:
        results: Any = run.run(None, {value.name or "": given for value in part.inputs})
        tables = [np.asarray(result).reshape(2, len(row), -1) for result in results]
    except Exception as error:  # whatever numpy raises
        return f"it cannot be had at {len(row)} places: {type(error).__name__}: {error}"
    cos, sin = (np.asarray(table, np.float64) for table in tables)
    turn = cos + 1j * sin
    # An angle in float32 is off by its last bits; cos and sin of two bytes are off by theirs.
    close = (1e-3 + 1e-7 * len(row) if tables[0].dtype.itemsize > 2 else 3e-2) * np.abs(turn[0, 0])
    if np.any(np.abs(turn[0] - turn[1, ::-1]) > close):
        return "a place is turned otherwise in other company"
    z, half = turn[0], turn[0, : (len(row) + 1) // 2]
    steps, doubles = z[1:] * z[0] - z[:-1] * z[1], z[::2] * z[0] - half**2
    if any(np.any(np.abs(off) > close * np.abs(z[0])) for off in (steps, doubles)):
        return "two places at one distance are turned apart by another angle elsewhere"
    return tables[0][0, :count], tables[1][0, :count]
