"""Captures that hold for the sample's sizes only, and another capture at sizes that do not happen to fit.

A model may ask whether its length is a multiple of something (Mamba 2: `if pad_size > 0`). Captured at such a length,
the program has the short way in it, and a guard that ONNX cannot hold: the graph is then wrong at other lengths.
Captured one position shorter it has the general way, which is right for both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def general(
    program: ExportedProgram,
    module: torch.nn.Module,
    inputs: Inputs,
    capture: Callable[[tuple[Any, ...], dict[str, Any]], ExportedProgram],
) -> ExportedProgram:
    """`program`, or where its guards refuse sample inputs one shorter: the program captured from those.

    The second is taken only if it computes what the module does on the sample inputs as well.
    """
    shorter = _shorter(program, inputs)
    if shorter is None or _admits(program, shorter[0]):
        return program
    try:
        other = capture(*shorter[1])
        if any(p.is_meta for p in module.parameters()):
            return program
        _compare(other, module, inputs)
    except Exception:  # whatever the model, torch.export or the program raises: the first capture stands
        return program
    return other


def _shorter(program: ExportedProgram, inputs: Inputs) -> tuple[dict[Any, int], Inputs] | None:
    """The sizes by symbol and the sample inputs with every dynamic size above 2 less by one; None where none is."""
    values = {n.name: n.meta.get("val") for n in program.graph.find_nodes(op="placeholder")}
    names = program.graph_signature.user_inputs
    leaves, structure = pytree.tree_flatten(inputs)
    if len(names) != len(leaves):
        return None
    sizes: dict[Any, int] = {}
    cut = []
    for name, leaf in zip(names, leaves, strict=True):
        value = values.get(name) if isinstance(name, str) else None
        if isinstance(value, torch.Tensor) and isinstance(leaf, torch.Tensor):
            shape: tuple[Any, ...] = tuple(value.shape)
            for axis, size in enumerate(shape):
                if not isinstance(size, torch.SymInt):
                    continue
                if not size.node.expr.is_Symbol:
                    return None
                length = leaf.shape[axis]
                sizes[size.node.expr] = length - 1 if length > 2 else length
                leaf = leaf.narrow(axis, 0, sizes[size.node.expr]).clone()  # a view would be guarded on its base
        cut.append(leaf)
    if not sizes:
        return None
    return sizes, pytree.tree_unflatten(cut, structure)


def _admits(program: ExportedProgram, sizes: dict[Any, int]) -> bool:
    """Do all guards of the capture hold at these sizes?"""
    values = (n.meta.get("val") for n in program.graph.find_nodes(op="placeholder"))
    mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None)
    env = getattr(mode, "shape_env", None)
    guards = (g.expr for g in env.guards) if env is not None else ()
    return not any(g.xreplace(sizes) == sympy.false for g in guards)


def _compare(program: ExportedProgram, module: torch.nn.Module, inputs: Inputs) -> None:
    """Raises AssertionError where the two differ."""
    args, kwargs = inputs
    with torch.no_grad():
        expected = pytree.tree_leaves(module(*args, **kwargs))
        actual = pytree.tree_leaves(program.module(check_guards=False)(*args, **kwargs))
    for e, a in zip(expected, actual, strict=True):
        if isinstance(e, torch.Tensor):
            torch.testing.assert_close(a, e)
