"""Which fusions of the original a fused program may be one of: read off the operators that it holds.

Nothing here decides anything. A fusion that is not tried can only lead to a refusal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from fxfuse.ops.registry import LAST_OPSET, OPS, PARTS
from fxfuse.recognise.answers import Pattern
from fxfuse.recognise.catalogue import catalogue

_SEVERAL = {"attention_with_present": ("Attention", "KVCache")}
"""Operators that come of more than one pattern."""


def attempts(
    original: ExportedProgram, fused: ExportedProgram, patterns: Sequence[Pattern] | None
) -> Iterator[dict[str, Any]]:
    """Arguments of `fxfuse.fuse`, the likeliest first."""
    called = [n for n in fused.graph.nodes if n.op == "call_function"]
    sets = _patterns(called) if patterns is None else [list(patterns)]
    options = [
        {"opset": LAST_OPSET if windows == "attributes" else 24, "windows": windows, "flex_attention": flex}
        for windows in _windows(called)
        for flex in _flex(called)
    ]
    persistent = any(s.kind is InputKind.BUFFER and s.persistent for s in original.graph_signature.input_specs)
    for frozen in (False, True) if persistent else (False,):
        for chosen in sets:
            for option in options:
                yield {**option, "patterns": chosen, "frozen": frozen}
    # What needs opset 24 may stand in the way of what an older opset has.
    for frozen in (False, True) if persistent else (False,):
        for chosen in sets:
            if any(p.since_opset > 23 for p in chosen):
                yield {"opset": 23, "patterns": [p for p in chosen if p.since_opset <= 23], "frozen": frozen}


def _patterns(called: list[Node]) -> list[list[Pattern]]:
    """The whole catalogue; then those whose operators occur."""
    names: set[str] = set()
    targets = {n.target for n in called}
    for target in targets:
        op = OPS.get(target) or PARTS.get(target)  # type: ignore[call-overload]
        if op is not None:
            names.update(_SEVERAL.get(op.overload._schema.name.split("::")[1], (op.onnx_name,)))
    every = catalogue()
    shipped = {op.onnx_name for op in (OPS | PARTS).values()} | {"KVCache"}
    some = [p for p in every if p.operator in names or p.operator not in shipped]
    return [every] if some == every else [every, some]


def _windows(called: list[Node]) -> list[str]:
    bounded = any(n.kwargs.get(side, -1) != -1 for n in called for side in ("left_window_size", "right_window_size"))
    return ["attributes", "mask"] if bounded else ["mask"]


def _flex(called: list[Node]) -> list[str]:
    held = any(str(n.target).startswith("fxfuse.flex_attention") for n in called)
    return ["preview", "preview_only", "standard"] if held else ["standard"]
