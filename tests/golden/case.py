"""A module, what it is called with, and the text of its graph before and after fusing."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

import fxfuse
from fxfuse.state import lift
from tests.golden.graph_text import Names, graph_text, number

FOLDER = Path(__file__).parent
_LINE = re.compile(r"cases\.py:\d+")


@dataclass(frozen=True)
class Case:
    """One rewrite.

    Attributes:
        module: its docstring heads the text.
        inputs: what it is captured with; a size of an axis that is dynamic should be no other's.
        sizes: for each input the axes whose size is free, with a letter for it (the same letter, the same size) or ""
            where it follows from others.
        declared: is the capture told that sizes with one letter are equal, or does it find that out?
        lifted: is what the module writes in place made inputs and outputs first, as `fxfuse.onnx.export` does?
        options: of `fxfuse.fuse`.
    """

    module: nn.Module
    inputs: tuple[torch.Tensor, ...]
    sizes: tuple[dict[int, str], ...]
    declared: bool = True
    lifted: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def program(self) -> ExportedProgram:
        dims = {letter: Dim(letter) for letter in self.letters if self.declared}
        shapes = tuple({axis: dims.get(letter, Dim.AUTO) for axis, letter in axes.items()} for axes in self.sizes)
        with fxfuse.flex_capture():
            program = torch.export.export(self.module.eval(), self.inputs, dynamic_shapes=shapes)
        return lift(program).program if self.lifted else program

    @property
    def letters(self) -> str:
        return "".join(dict.fromkeys(letter for axes in self.sizes for letter in axes.values()))

    def text(self) -> str:
        """The docstring, the graph before, what the report says, the graph after."""
        before, names = self.program(), Names(self.letters)
        after = fxfuse.fuse(before, opset=24, **self.options)
        about, graph = inspect.cleandoc(type(self.module).__doc__ or ""), graph_text(before, names)
        called = {node.name: name for node, name in names.values.items()}
        called |= {str(symbol): str(letter) for symbol, letter in names.sizes.items()}
        said = "".join(f"{line}\n" for line in _said(after, called))
        fused = graph_text(after, Names(self.letters))
        fused = "as before\n" if fused == graph else fused
        return f"{about}\n\n--- before\n{graph}\n--- report\n{said}\n--- after\n{fused}"


def _said(program: ExportedProgram, called: dict[str, str]) -> Iterator[str]:
    """What the report says of each region, with the names that the text has for nodes and sizes."""
    for entry in fxfuse.report(program):
        yield f"{entry.operator}: {entry.status}"
        for name, value in entry.parameters.items():
            values = value if isinstance(value, list) else [value]
            text = ", ".join(called.get(v, v) if isinstance(v, str) else number(v) for v in values)
            yield f"    {name}: {'none' if text in ('', 'None') else text}"
        if entry.reason:
            yield f"    {_LINE.sub('cases.py', entry.reason)}"


def cases() -> dict[Path, Case]:
    """All cases, by the file that holds their text: ``rms_norm/float_inside.txt``.

    A folder whose cases need what this torch does not have (PT2E's operators, one day) has none.
    """
    found = {}
    for module in sorted(FOLDER.glob("*/cases.py")):
        try:
            given: dict[str, Case] = import_module(f"tests.golden.{module.parent.name}.cases").CASES
        except ModuleNotFoundError:
            continue
        found |= {module.parent / f"{name}.txt": case for name, case in given.items()}
    return found
