"""What the reader says of a tensor, held to what the exported program computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from fxfuse.graph.program import copy_program
from fxfuse.graph.view import fake, mutated
from fxfuse.proof.positions.reader import Reader, Unreadable
from fxfuse.proof.positions.terms import Term, value_of
from fxfuse.proof.sizes import ranges_of
from fxfuse.recognise.probe import Probe
from fxfuse.state.functional import functionalise

SIZES = (1, 2, 7, 65, 130, 300)
WHOLE = 150
"""Tensors of up to this many elements are compared whole, of others some elements."""


class Counted(nn.Module):
    """Tensors that are made of one length, which an input has; `constants` are buffers that keep what they hold."""

    def __init__(self, function: Callable[..., Any], constants: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.function = function
        self.names = list(constants)
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, x: Tensor) -> Any:
        made = self.function(x.shape[0], *(getattr(self, n) for n in self.names))
        return tuple(made) if isinstance(made, (list, tuple)) else (made,)


def export(function: Callable[..., Any], most: int = 1 << 20, **constants: Tensor) -> ExportedProgram:
    """`function(S, *constants)` for a free length S."""
    module = Counted(function, constants)
    for length in (Dim("S", min=1, max=most), Dim.AUTO):
        try:
            return torch.export.export(module, (torch.ones(7),), dynamic_shapes=({0: length},), strict=False)
        except torch._dynamo.exc.UserError:  # it asks for a length that is not so short
            continue
    raise ValueError("it is captured for one length only")


class Read:
    """A program, and what is read of it."""

    def __init__(self, program: ExportedProgram, *, functional: bool = False) -> None:
        self.module: Any = program.module()
        if functional:  # as `fuse` reads it
            program = copy_program(program)
            functionalise(program.graph)
        self.program = program
        self.reader: Reader = Probe(program).reader
        self.symbols = [str(s) for s in ranges_of(program)]
        outputs: Any = next(n for n in program.graph.nodes if n.op == "output").args[0]
        self.outputs: list[Node] = list(outputs)

    def term(self, place: int = 0) -> Term:
        """An output, at free indices i0, i1, …

        Raises:
            Unreadable: it cannot be read.
        """
        return self.reader.read(self.outputs[place], self.reader.index(self.outputs[place]))

    def computed(self, size: int) -> list[Tensor]:
        with torch.no_grad():
            return list(self.module(torch.ones(size)))

    def value(self, term: Term, index: Sequence[int], size: int) -> Any:
        """What the term is there.

        Raises:
            Opaque: it depends on a step of which the reader knows nothing.
        """
        values = dict.fromkeys(self.symbols, size) | {f"i{a}": i for a, i in enumerate(index)}
        return value_of(self._with_tables(term, values), values)

    def _with_tables(self, term: Term, values: dict[str, int]) -> Term:
        """Elements of tables as the numbers that they are; conditions first, for only one of two branches is met."""
        if not any(part.op in ("given", "apply") for part in term.walk()):
            return term
        t = self.reader.terms
        if term.op == "given" and str(term.args[0]).startswith("table "):
            table = self.reader.tables[str(term.args[0]).removeprefix("table ")]
            place = tuple(value_of(self._with_tables(i, values), values) for i in term.args[1:])
            return t.number(table[place].item())
        if term.op in ("given", "apply"):
            raise Opaque(repr(term))
        if term.op == "choose":
            condition = value_of(self._with_tables(term.args[0], values), values)
            return self._with_tables(term.args[1 if condition else 2], values)
        if term.op == "sum":
            number = term.args[0] + sum(c * value_of(self._with_tables(p, values), values) for p, c in term.args[1])
            return t.number(number)
        parts = [self._with_tables(a, values) if isinstance(a, Term) else a for a in term.args]
        return Term(term.op, tuple(parts), term.kind, term.bounds, -1)


class Opaque(Exception):
    """The term says which step it depends on, and not what that is."""


def check(function: Callable[..., Any], *, sizes: Sequence[int] = SIZES, **constants: Tensor) -> list[str]:
    """Is everything that is read of the function's results what is computed? For each: ``"read"`` or why not."""
    program = export(function, **constants)
    answers = check_program(Read(program), sizes)
    if not any(mutated(node) for node in program.graph.nodes):
        return answers
    also = check_program(Read(program, functional=True), sizes)
    return [a if a == "read" else b for a, b in zip(answers, also, strict=True)]


def check_program(read: Read, sizes: Sequence[int] = SIZES) -> list[str]:
    """The same for an exported program.

    Raises:
        AssertionError: something that is read is not what is computed.
    """
    runs = {size: found for size in sizes if (found := _run(read, size)) is not None}
    assert len(runs) > 1, "it runs at no other length than it was captured for"
    answers = []
    for place in range(len(read.outputs)):
        try:
            term = read.term(place)
        except Unreadable as error:
            answers.append(str(error))
            continue
        answers.append(_compare(read, place, term, {size: found[place] for size, found in runs.items()}))
    return answers


def _run(read: Read, size: int) -> list[Tensor] | None:
    try:
        return read.computed(size)
    except Exception:  # the program does not take this length
        return None


def _compare(read: Read, place: int, term: Term, results: Mapping[int, Tensor]) -> str:
    for size, result in results.items():
        if result.dim() != fake(read.outputs[place]).dim():  # `squeeze` of a size that is one after all
            continue
        for index in _places(result):
            try:
                said = read.value(term, index, size)
            except Opaque as error:
                return f"opaque: {error}"
            there = result[index].item()
            assert said == there, (
                f"{read.outputs[place].name} at {list(index)} of length {size} is read as {said}, is {there}: {term!r}"
            )
    return "read"


def _places(result: Tensor) -> Iterator[tuple[int, ...]]:
    """All, or the corners and some that are drawn."""
    if result.numel() <= WHOLE:
        yield from (tuple(i) for i in torch.ones(result.shape, dtype=torch.bool).nonzero().tolist())
        return
    draw = torch.Generator().manual_seed(result.numel())
    sizes = torch.tensor(result.shape)
    for kind in range(3):
        picked = (torch.rand((20, result.dim()), generator=draw, dtype=torch.float64) * sizes).long()
        if kind == 1:  # near the end
            picked = (sizes - 1 - picked % 3).clamp(min=0)
        if kind == 2 and result.dim() > 1:  # near the diagonal
            step = torch.randint(-1, 2, (20,), generator=draw)
            picked[:, -1] = (picked[:, -2] + step).clamp(min=0).minimum(sizes[-1] - 1)
        yield from (tuple(i) for i in picked.tolist())
