"""A drawn program: a small module as text, and the inputs that it is run on.

It prints as the module that it is, so a failure that hypothesis has shrunk is read like any other model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

LONGEST = 300
"""The longest sequence that a program is run on."""
TABLE = 320
"""The length of tables in buffers: nothing is looked up beyond them."""


@dataclass(frozen=True)
class Run:
    """Sizes and magnitudes of one call."""

    batch: int = 2
    length: int = 7
    past: int = 5
    """Keys in the cache before the new ones, or the first slot that is written."""
    scale: float = 1.0
    """What every value that is drawn is multiplied with."""
    outlier: float = 1.0
    """What the values of one feature are multiplied with, besides."""
    hidden: int = 0
    """How many rows of a mask see no key, or how many tokens are padding."""
    seed: int = 0

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """On one line."""
        printer.text(repr(self))


@dataclass(frozen=True)
class Input:
    """A parameter of `forward`. Sizes are numbers or the letters B, S (length), P (past) and T (both)."""

    name: str
    shape: tuple[int | str, ...]
    kind: str = "values"
    """``values``, ``mask`` (bool), ``padding`` (bool, on the left), ``positions``, ``start`` or ``packed``."""

    def sizes(self, run: Run) -> tuple[int, ...]:
        sizes = {"B": run.batch, "S": run.length, "P": run.past, "T": run.past + run.length}
        return tuple(n if isinstance(n, int) else sizes[n] for n in self.shape)

    def make(self, run: Run, draws: torch.Generator) -> Tensor:
        return _KINDS[self.kind](self.sizes(run), run, draws)


def _values(sizes: tuple[int, ...], run: Run, draws: torch.Generator) -> Tensor:
    values = torch.randn(sizes, generator=draws) * run.scale
    if run.outlier != 1.0:
        values[..., run.seed % sizes[-1]] *= run.outlier
    return values


def _mask(sizes: tuple[int, ...], run: Run, draws: torch.Generator) -> Tensor:
    mask = torch.rand(sizes, generator=draws) < 0.7
    mask[..., 0] = True
    mask[..., : run.hidden, :] = False
    return mask


def _padding(sizes: tuple[int, ...], run: Run, draws: torch.Generator) -> Tensor:
    mask = torch.ones(sizes, dtype=torch.bool)
    mask[0, : min(run.hidden, sizes[1] - 1)] = False
    return mask


def _positions(sizes: tuple[int, ...], run: Run, draws: torch.Generator) -> Tensor:
    return (torch.arange(sizes[-1]) + min(run.past, TABLE - sizes[-1])).expand(sizes).clone()


def _start(sizes: tuple[int, ...], run: Run, draws: torch.Generator) -> Tensor:
    return torch.tensor(min(run.past, TABLE - run.length)).reshape(sizes)


def _packed(sizes: tuple[int, ...], run: Run, draws: torch.Generator) -> Tensor:
    return torch.randint(-128, 128, sizes, generator=draws, dtype=torch.int8)


_KINDS: dict[str, Callable[[tuple[int, ...], Run, torch.Generator], Tensor]] = {
    "values": _values,
    "mask": _mask,
    "padding": _padding,
    "positions": _positions,
    "start": _start,
    "packed": _packed,
}


@dataclass
class Body:
    """What a strategy writes a program into."""

    lines: list[str] = field(default_factory=list)
    attributes: list[str] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)
    """What makes the program differ from the operator; empty where nothing does, as far as its author knows."""
    harmless: bool = False
    """Nothing is broken, or what is lies beside the operator."""
    fill: float = -math.inf
    """The greatest number that stands for a hidden key and counts as minus infinity: scores have to stay above it."""

    def line(self, text: str) -> None:
        self.lines.append(text)

    def parameter(self, name: str, value: str) -> str:
        self.attributes.append(f"self.{name} = nn.Parameter({value})")
        return f"self.{name}"

    def buffer(self, name: str, value: str, persistent: bool = True) -> str:
        self.attributes.append(f'self.register_buffer("{name}", {value}{"" if persistent else ", persistent=False"})')
        return f"self.{name}"

    def program(self, family: str, inputs: list[Input], result: str, pattern: str | None = None) -> Program:
        lines = (*self.lines, f"return {result}")
        given = tuple(inputs), tuple(self.attributes), lines, tuple(self.breaks)
        return Program(family, *given, harmless=self.harmless, fill=self.fill, pattern=pattern)


@dataclass(frozen=True)
class Program:
    """A module in text."""

    family: str
    inputs: tuple[Input, ...]
    attributes: tuple[str, ...]
    lines: tuple[str, ...]
    breaks: tuple[str, ...] = ()
    harmless: bool = False
    fill: float = -math.inf
    pattern: str | None = None
    """The pattern by example that is looked for; None: the catalogue."""

    def source(self) -> str:
        said = "; ".join(self.breaks) or "nothing is broken"
        text = ["class Drawn(nn.Module):", f'    """{self.pattern or self.family}: {said}."""', ""]
        if self.attributes:
            text += ["    def __init__(self):", "        super().__init__()"]
            text += ["        torch.manual_seed(0)"] if any("rand" in a for a in self.attributes) else []
            text += [*(f"        {a}" for a in self.attributes), ""]
        text.append(f"    def forward(self, {', '.join(i.name for i in self.inputs)}):")
        text += [f"        {line}" for line in self.lines]
        return "\n".join(text)

    def __repr__(self) -> str:
        return f"\n{self.source()}\n"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis prints fields otherwise."""
        printer.text(repr(self))

    def module(self) -> nn.Module:
        names: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "math": math, "Tensor": Tensor}
        exec(compile(self.source(), f"<{self.family}>", "exec"), names)
        module: nn.Module = names["Drawn"]().eval().requires_grad_(False)
        return module

    def arguments(self, run: Run) -> tuple[Tensor, ...]:
        draws = torch.Generator().manual_seed(run.seed)
        return tuple(i.make(run, draws) for i in self.inputs)

    def export(self) -> ExportedProgram:
        """With every size that has a letter dynamic, and equal where the letters are; else as torch finds them."""
        try:
            return self._export({letter: Dim(letter) for letter in "BSP"})
        except torch._dynamo.exc.UserError:  # a letter is a number, or two are one
            return self._export(dict.fromkeys("BSP", Dim.AUTO))

    def _export(self, letters: dict[str, Any]) -> ExportedProgram:
        dims = [{n: letters[size] for n, size in enumerate(i.shape) if isinstance(size, str)} for i in self.inputs]
        return torch.export.export(self.module(), self.arguments(Run()), dynamic_shapes=tuple(dims), strict=False)

    def accepts(self, arguments: tuple[Tensor, ...]) -> bool:
        """Are scores above the number that stands for a hidden key, by far? A bound from the two greatest inputs."""
        if self.fill == -math.inf:
            return True
        values = [t for t, i in zip(arguments, self.inputs, strict=True) if i.kind == "values"]
        sizes = sorted(float(t.abs().max()) for t in values)
        return 100 * sizes[-1] ** 2 * values[0].shape[-1] <= -self.fill
