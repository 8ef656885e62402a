"""Whether a program that was handed to somebody is still what it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

import fxfuse.fusion
from fxfuse.recognise.probe import written_targets


def snapshot(program: ExportedProgram) -> dict[str, Any]:
    """Everything that a caller could see of a program, in plain data."""
    modules = {name: m for name, m in program.graph_module.named_modules() if isinstance(m, GraphModule)}
    env = next((v.fake_mode.shape_env for v in _values(program) if hasattr(v, "fake_mode")), None)
    return {
        "graphs": {name: str(m.graph) for name, m in modules.items()},
        "code": {name: m.code for name, m in modules.items()},
        "modules": {name: id(m) for name, m in program.graph_module.named_modules()},
        "metadata": {f"{name}.{n.name}": _metadata(n.meta) for name, m in modules.items() for n in m.graph.nodes},
        "of the graph": {name: _metadata(m.meta) for name, m in modules.items()},
        "weights": {name: _tensor(t) for name, t in program.state_dict.items()},
        "constants": {name: _tensor(t) for name, t in program.constants.items()},
        "signature": str(program.graph_signature),
        "ranges": str(program.range_constraints),
        "calls": str(program.module_call_graph),
        "examples": [id(leaf) for leaf in torch.utils._pytree.tree_leaves(program.example_inputs)],
        "symbols": env and (len(env.guards), str(env.replacements), str(env.var_to_range)),
        "verifiers": list(program.verifiers),
    }


@contextmanager
def left_as_it_was(program: ExportedProgram) -> Iterator[None]:
    """Whatever happens in the block, the program is the same after it, and computes the same bits."""
    args, kwargs = program.example_inputs
    expected = program.module()(*args, **kwargs)
    before = snapshot(program)
    try:
        yield
    finally:
        assert_same(before, snapshot(program))
    torch.testing.assert_close(program.module()(*args, **kwargs), expected, rtol=0, atol=0, equal_nan=True)


@contextmanager
def all_left_as_they_were(monkeypatch: Any) -> Iterator[None]:
    """Every program that is fused in the block, through whichever door, is the same after it."""
    met: list[tuple[ExportedProgram, dict[str, Any]]] = []
    copy = fxfuse.fusion.copy_program

    def remembered(program: ExportedProgram) -> ExportedProgram:
        met.append((program, snapshot(program)))
        return copy(program)

    monkeypatch.setattr(fxfuse.fusion, "copy_program", remembered)
    yield
    for program, before in met:
        after = snapshot(program)
        # torch.onnx decomposes what was fused, and notes guards in the environment that all share.
        del before["symbols"]
        for name in written_targets(program):  # and what the program writes itself was run, too
            for held in ("weights", "constants"):
                before[held].pop(name, None)
                after[held].pop(name, None)
        assert_same(before, after)


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for what, was in before.items():
        assert after[what] == was, f"the {what} of the caller's program changed"


def _values(program: ExportedProgram) -> Iterator[Any]:
    for node in program.graph.nodes:
        yield node.meta.get("val")


def _metadata(meta: dict[str, Any]) -> dict[str, Any]:
    values = torch.utils._pytree.tree_leaves(meta.get("val"))
    return {**{key: repr(value) for key, value in meta.items()}, "values": [id(v) for v in values]}


def _tensor(value: Any) -> Any:
    return (id(value), value._version, value.requires_grad) if isinstance(value, torch.Tensor) else id(value)
