"""One call, run piece by piece as the proof runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fxfuse.proof.breaks import Break, Breaks
from fxfuse.proof.evaluate import Evaluator
from fxfuse.proof.sizes import Sizes, ranges_of


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def export(function: Callable[..., Any], *inputs: Tensor) -> ExportedProgram:
    """The first axis of the first input is free."""
    free = tuple({0: Dim.AUTO} if n == 0 else {} for n in range(len(inputs)))
    return torch.export.export(Function(function), inputs, dynamic_shapes=(free,), strict=False)


def evaluate(program: ExportedProgram, *inputs: Tensor, breaks: Breaks | None = None, **options: Any) -> Tensor:
    """The result for these inputs, in float64 unless `exact` is False."""
    evaluator = Evaluator(Sizes(ranges_of(program)), **options)
    if breaks is not None:
        breaks.start()
        evaluator.breaks = breaks
    nodes = list(program.graph.nodes)
    places = [n for n in nodes if n.op == "placeholder"]
    given = [t.double() if t.is_floating_point() and evaluator.exact else t for t in inputs]
    values = evaluator.run([n for n in nodes if n.op == "call_function"], dict(zip(places, given, strict=True)))
    if breaks is not None and breaks.outside is None:
        breaks.count()
    result: Tensor = values[nodes[-1].args[0][0]]
    return result


def broken(function: Callable[..., Any], *draws: Sequence[Tensor], like: Sequence[Tensor] | None = None) -> Break:
    """The one break of the function, after these draws."""
    program = export(function, *(like or draws[0]))
    breaks = Breaks()
    for inputs in draws:
        evaluate(program, *inputs, breaks=breaks)
    (found,) = breaks.found.values()
    return found
