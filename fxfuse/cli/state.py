"""How the command line reports state that a model writes in place."""

from __future__ import annotations

from typing import Any

import torch

from fxfuse.state.lift import State

Pairs = list[tuple[State, str, str]]
"""States with their inputs and outputs in the ONNX graph."""


def record_of(pairs: Pairs) -> list[dict[str, Any]]:
    """The states as `report.json` has them."""
    return [
        {
            "input": was,
            "output": present,
            "target": state.target,
            "shape": None if state.initial is None else list(state.initial.shape),
            "dtype": None if state.initial is None else str(state.initial.dtype).removeprefix("torch."),
            "source": state.source,
            "initial": None if state.initial is None else _uniform(state.initial),
        }
        for state, was, present in pairs
    ]


def describe(pairs: Pairs) -> list[str]:
    """One line for each state."""
    lines = []
    for state in record_of(pairs):
        where = f" (written at {state['source']})" if state["source"] else ""
        if state["shape"] is None:
            lines.append(f"{state['input']} is written to in place, and comes out as {state['output']}{where}")
            continue
        size = "×".join(map(str, state["shape"])) or "scalar"
        starts = "as the model holds it" if state["initial"] is None else f"as {state['initial']}"
        lines.append(
            f"{state['target']} is state: input {state['input']}, {size} {state['dtype']}, starts {starts}; "
            f"feed it {state['output']} of the call before{where}"
        )
    return lines


def _uniform(tensor: torch.Tensor) -> float | int | bool | None:
    """The number that all elements are; None if they differ."""
    if tensor.is_meta or tensor.numel() == 0 or tensor.is_complex():
        return None
    first = tensor.flatten()[0]
    value: float | int | bool = first.item()
    return value if bool((tensor == first).all()) else None
