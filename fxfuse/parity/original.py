"""What the original computes, at the sizes that its capture admits; call after call, if it writes in place."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch.export import ExportedProgram

from fxfuse.errors import FxfuseError
from fxfuse.parity.eager import eager_outputs, run_original
from fxfuse.parity.shapes import ShapeCase, shape_cases
from fxfuse.parity.wide import tensors_of
from fxfuse.state.lift import Lifted, State
from fxfuse.torch_seams import pytree


def original_outputs(
    model: torch.nn.Module | ExportedProgram,
    lifted: Lifted,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[ShapeCase], list[list[torch.Tensor]]]:
    """Inputs of `lifted` at its export shape, at batch 1 and at another batch and length, and what `model` gives.

    The other length is a longer one, or a shorter one where the model has no room for it, which a capture does not say.

    Args:
        model: what was captured. Its state is put back.
        lifted: its capture.
        args: sample inputs, for a program that was saved without any.
        kwargs: the same by name.

    Raises:
        FxfuseError: the model does not run at one of these sizes.
    """
    refused: FxfuseError | None = None
    for longer in (True, False):
        cases = shape_cases(lifted.program, args, kwargs, longer=longer)
        try:
            if lifted.states:
                return consecutive_calls(model, lifted, cases)
            return cases, eager_outputs(model, cases)
        except FxfuseError as error:
            refused = refused or error
    assert refused is not None
    raise refused


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
    try:
        for case in cases:
            before = {s.placeholder: t.detach().clone() for s, t in zip(buffers, held, strict=True)}
            inputs = ShapeCase(case.label, case.args, {**case.kwargs, **before})
            given.append(inputs)
            args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (inputs.args, inputs.kwargs))
            leaves = dict(zip(names, pytree.tree_leaves((args, kwargs)), strict=True))
            own = {name: value for name, value in kwargs.items() if name not in before}
            returned = run_original(module, ShapeCase(case.label, args, own))
            after = [leaves[s.placeholder] if s.initial is None else _tensor(module, s) for s in lifted.states]
            outputs = [t.clone() for t in (*tensors_of(returned), *after)]
            results.append(outputs)
    finally:
        with torch.no_grad():
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
