"""What a pattern says of a region: `Found`, with the operator that replaces it, or a `Reason` why not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from fxfuse.graph.region import Region
from fxfuse.graph.view import GraphView
from fxfuse.proof.floor import Floor

if TYPE_CHECKING:
    from fxfuse.recognise.probe import Probe


@dataclass(frozen=True)
class Input:
    """A parameter that is a tensor: the report names the node at this position of `Region.inputs`."""

    position: int


Form = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
"""A plain function of the region's inputs, in the order of `Region.inputs`, that gives its output, or all of its
`Region.outputs`. The same function is proven and traced into the graph, so what is proven is what is spliced."""


@dataclass(frozen=True)
class Found:
    """The region is this operator, with these parameters."""

    operator: str
    parameters: dict[str, Any]
    """What was measured, for the report. A function is called with each region that it is the answer for."""
    forms: tuple[Form, ...]
    """Ways to say it, best first. They agree in exact arithmetic; the proof takes the first that also rounds alike."""
    rank: int = 0
    """Among regions around one anchor the highest rank wins (a norm with its weight over the norm without)."""
    ulp: float = 2.0
    """Bound on the difference to the region in its own dtype, in units in the last place of the result's size."""
    averaging: bool = False
    """The operator sums in an order of its own (attention): in low precision it must be as accurate as the region
    against float64, not equal to it bit by bit."""
    from_leaves: bool = False
    """It holds for the values that `Region.others` take in this program (both halves of cos equal, a mask that is
    causal), not for arbitrary ones: the proof computes them from the program's inputs and constants."""
    masks: tuple[tuple[int, float], ...] = ()
    """Which of `Region.others` hide keys, and with which factor they are added: they may hold what hides, -inf and the
    type's minimum, anywhere, whole rows included."""
    read: bool = False
    """What it computes of positions was read step by step in functions that it is given: no draw has to show it."""
    floor: Floor | None = None
    """Rows of the source so small that the operator's epsilon differs from what the model has in its place."""
    claims: tuple[str, ...] = ()
    """What was read of positions and sizes, and how it was decided: for the report."""
    meaning: Form | None = None
    """The user's example with its arguments in the order of the inputs: its breaks are met too."""
    also: tuple[tuple[str, Form], ...] = ()
    """What else has to compute the same, in float64, with words for it: what `unfuse` writes the operator out as."""
    decomposed: str | None = None
    """The forms are primitives, not one operator; this says why they are not."""
    otherwise: Found | None = None
    """What to take where this is not proven."""

    def after(self, refusal: str) -> Found:
        """It, where something better was refused: what is decomposed says why."""
        return self if self.decomposed is None else replace(self, decomposed=refusal)


@dataclass(frozen=True)
class Reason:
    """The region is not the operator; `closeness` counts the properties that did hold."""

    text: str
    closeness: int = 0


NEAR = 2
"""A region this close is worth telling the user about."""


@dataclass
class Proposal:
    """One anchor and the regions around it to ask, in the order of preference."""

    anchor: Node
    regions: Iterable[Region]
    missed: Reason | None = None
    """Why no region could be proposed, where that is already known."""
    nodes: tuple[Node, ...] = field(default=())
    otherwise: Reason | None = None
    """What to say where there turns out to be no region to ask."""
    shares: bool = False
    """Regions around other anchors may compute some of the same on the way (two softmaxes of the same scores)."""
    best_rank: int | None = None
    """No region around this anchor can rank higher: the first of this rank that proves itself is taken."""


@runtime_checkable
class Pattern(Protocol):
    """A meaning: where to look for it, and how to tell.

    A pattern that is a frozen dataclass may have options of its own (`fxfuse.recognise.declared`). What else a pattern
    may do, where it has to: `Captures`, `Prepares`, `Varies`.

    A shipped pattern may say more of itself: `after` and `before`, the names of patterns that apply before it and after
    it (`fxfuse.recognise.catalogue.ordered`), and `signs`, the names of operators by which one suspects it where nobody
    can look (`fxfuse.report.left`).
    """

    name: str
    operator: str
    since_opset: int

    def propose(self, view: GraphView, ask: Probe) -> Iterator[Proposal]:
        """Candidate regions, cheaply and structurally."""
        ...

    def recognise(self, region: Region, ask: Probe) -> Found | Reason:
        """Is the region this operator? Asked by evaluating it.

        Regions of equal `Region.key` get one answer, unless it was found with the values of this program's leaves.
        """
        ...


@runtime_checkable
class Prepares(Protocol):
    """A pattern that makes the program ready, before any pattern looks at it."""

    def prepare(self, program: ExportedProgram, ask: Probe) -> None:
        """Change the program in place, which is `fuse`'s copy, to another that computes the same."""
        ...


@runtime_checkable
class Captures(Protocol):
    """A pattern that needs programs to be captured in some way, or what it looks for is not in them."""

    def capturing(self) -> AbstractContextManager[None]:
        """Within it a model is captured as the pattern needs it; in this thread, and nothing stays behind.

        Every door that captures enters it, for the patterns of the catalogue.
        """
        ...


@runtime_checkable
class Varies(Protocol):
    """A pattern whose options show in what it puts into a program."""

    def variants(self, calls: Sequence[Node]) -> Sequence[Pattern]:
        """The pattern with each choice of options that these calls of a fused program may come from, the likeliest
        first. `fxfuse.verify` fuses the original again with each."""
        ...


def is_pattern(value: object) -> bool:
    """Is it a pattern, and not the class of one?"""
    if isinstance(value, type) or not isinstance(value, Pattern):
        return False
    return isinstance(value.since_opset, int) and all(isinstance(t, str) for t in (value.name, value.operator))
