"""State that a model writes in place, at the command line: what became of it, and parity over consecutive calls."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxfuse.cache.lift import Lifted, State
from fxfuse.parity import ShapeCase

Pairs = list[tuple[State, str, str]]
"""States with their inputs and outputs in the ONNX graph."""


def consecutive_calls(
    model: torch.nn.Module | ExportedProgram, lifted: Lifted, cases: list[ShapeCase]
) -> tuple[list[ShapeCase], list[list[torch.Tensor]]]:
    """Runs the original on one case after the other, its state going from each to the next, and puts it back.

    Args:
        model: what was captured.
        lifted: its capture.
        cases: inputs of the lifted program.

    Returns:
        The cases as the lifted program has them, each with the state that the original had before that call; and for
        each what the original returned, and its state after the call.
    """
    buffers = [s for s in lifted.states if s.initial is not None]
    module = model.module(check_guards=False) if isinstance(model, ExportedProgram) else model
    held = [_tensor(module, s) for s in buffers]
    first = [t.detach().clone() for t in held]
    names = list(lifted.program.graph_signature.user_inputs)
    given, results = [], []
    with torch.no_grad():
        for case in cases:
            before = {s.placeholder: t.detach().clone() for s, t in zip(buffers, held, strict=True)}
            inputs = ShapeCase(case.label, case.args, {**case.kwargs, **before})
            given.append(inputs)
            args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (inputs.args, inputs.kwargs))
            leaves = dict(zip(names, pytree.tree_leaves((args, kwargs)), strict=True))
            returned = module(*args, **{name: value for name, value in kwargs.items() if name not in before})
            after = [leaves[s.placeholder] if s.initial is None else _tensor(module, s) for s in lifted.states]
            outputs = [t.clone() for t in (*pytree.tree_leaves(returned), *after) if isinstance(t, torch.Tensor)]
            results.append(outputs)
        for tensor, value in zip([_tensor(module, s) for s in buffers], first, strict=True):
            tensor.copy_(value)
    return given, results


def _tensor(module: torch.nn.Module, state: State) -> torch.Tensor:
    """The tensor of the module, which may hold another after every call; of one without a name, what was captured."""
    try:
        found: Any = attrgetter(state.target)(module)
    except AttributeError:
        found = state.initial
    assert isinstance(found, torch.Tensor), "a state is a tensor"
    return found


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
    """The number that every element is; None where they differ."""
    if tensor.is_meta or tensor.numel() == 0 or tensor.is_complex():
        return None
    first = tensor.flatten()[0]
    value: float | int | bool = first.item()
    return value if bool((tensor == first).all()) else None
