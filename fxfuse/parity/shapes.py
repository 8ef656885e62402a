"""Inputs at other sizes: the export shape, batch 1, and another batch and length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram

from fxfuse.errors import FxfuseError
from fxfuse.torch_seams import pytree


@dataclass(frozen=True)
class ShapeCase:
    """Inputs for one run of a program."""

    label: str
    """``"export shape"``, ``"batch 1"``, ``"other shape"``."""
    args: tuple[Any, ...] = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)

    @property
    def inputs(self) -> list[torch.Tensor]:
        """The tensors, in the order of the ONNX graph's inputs."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]

    @property
    def sizes(self) -> str:
        """``"2×16"``: the shapes of the inputs."""
        return ", ".join("×".join(map(str, t.shape)) or "scalar" for t in self.inputs)


def shape_cases(
    program: ExportedProgram,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    longer: bool = True,
) -> list[ShapeCase]:
    """Inputs for `program` at its export shape and, where its dimensions are dynamic, at batch 1 and at another shape.

    The symbols in the first dimensions of the inputs are taken for batches. Larger inputs repeat the sample's values
    along each dimension, so that indices stay valid; inputs that share a symbol keep sharing its size.

    Args:
        program: captured; with its example inputs, unless `args` are given.
        args: sample inputs; their dynamic dimensions may differ from the export shape's.
        kwargs: the same by name.
        longer: is the other shape longer than the sample, or shorter?

    Raises:
        FxfuseError: the program has no example inputs, and none are given.
    """
    if args is None:
        if program.example_inputs is None:
            raise FxfuseError("the program was saved without example inputs", hint="save it with them, or pass args")
        args, kwargs = program.example_inputs
    args, kwargs = tuple(args), dict(kwargs or {})
    cases = [ShapeCase("export shape", args, kwargs)]

    fakes = _fakes(program)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    sizes: dict[Any, int] = {}
    batches: set[Any] = set()
    for fake, leaf in zip(fakes, leaves, strict=True):
        if isinstance(fake, torch.Tensor):
            for axis, expression in _symbolic(fake):
                if expression.is_symbol:
                    sizes.setdefault(expression, leaf.shape[axis])
                batches |= expression.free_symbols if axis == 0 else set()

    def at(label: str, wanted: dict[Any, int]) -> None:
        chosen = {symbol: _within(program, symbol, size) for symbol, size in wanted.items()}
        if chosen != sizes:
            resized = [_resize(fake, leaf, chosen) for fake, leaf in zip(fakes, leaves, strict=True)]
            args, kwargs = pytree.tree_unflatten(resized, spec)
            cases.append(ShapeCase(label, args, kwargs))

    at("batch 1", {symbol: 1 if symbol in batches else size for symbol, size in sizes.items()})
    step = 3 if longer else -1
    at("other shape", {symbol: size + (1 if symbol in batches else step) for symbol, size in sizes.items()})
    return cases


def _fakes(program: ExportedProgram) -> list[Any]:
    placeholders = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    return [placeholders[name].meta.get("val") for name in names]


def _within(program: ExportedProgram, symbol: Any, size: int) -> int:
    """`size` moved into the symbol's range. A lower bound of 2 only says that 0 and 1 were not looked at."""
    bounds = program.range_constraints.get(symbol)
    if bounds is None:
        return size
    lower = 1 if bounds.lower <= 2 else int(bounds.lower)
    return int(max(lower, min(size, bounds.upper)))


def _resize(fake: Any, leaf: Any, sizes: Mapping[Any, int]) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    for axis, expression in _symbolic(fake):
        wanted = int(expression.subs(sizes))
        leaf = leaf.index_select(axis, torch.arange(wanted, device=leaf.device) % leaf.shape[axis])
    return leaf


def _symbolic(fake: torch.Tensor) -> list[tuple[int, Any]]:
    """The dynamic dimensions of `fake`: axis and sympy expression."""
    shape: list[Any] = list(fake.shape)
    return [(axis, size.node.expr) for axis, size in enumerate(shape) if isinstance(size, torch.SymInt)]
