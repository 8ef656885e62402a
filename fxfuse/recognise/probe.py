"""What a pattern asks with: values to run regions with, evaluators, what is constant, and how sizes relate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from fxfuse.graph.view import fake, op_name, size_text
from fxfuse.proof.derived import derived_sizes
from fxfuse.proof.evaluate import CannotEvaluate, Evaluator
from fxfuse.proof.multiples import multiples_of
from fxfuse.proof.positions.claims import one_number
from fxfuse.proof.positions.reader import Reader
from fxfuse.proof.sizes import Sizes, places_of, ranges_of
from fxfuse.recognise.constants import Constants, constant_values, may_change, written_targets
from fxfuse.recognise.drawn import Draws
from fxfuse.recognise.kept import Kept

__all__ = ["OutOfTime", "Probe", "may_change", "written_targets"]


class OutOfTime(Exception):
    """The search took longer than it may."""


class Probe(Draws):
    """Everything there is to ask about the regions of one program.

    Args:
        frozen: do persistent buffers keep what they hold? On the way to a file they do; in a program that goes on
            living `load_state_dict` may change them.
        strict: is nothing fused that differs, be it on rows of 1e-9?
        accept: refusals that the caller overrules, by name.
        until: when the search has to end, by `time.perf_counter`.
        written: the targets of what the program writes to, where that is known already.
    """

    def __init__(
        self,
        program: ExportedProgram,
        *,
        frozen: bool = False,
        strict: bool = False,
        accept: frozenset[str] = frozenset(),
        until: float | None = None,
        written: frozenset[str] | None = None,
    ) -> None:
        written = written_targets(program) if written is None else written
        self.ranges = ranges_of(program)
        self.strict = strict
        self.accept = accept
        self.settled: dict[Any, Any] = {}
        """What patterns found out and keep for later, by keys of their own."""
        super().__init__(Constants(program, frozen, written))
        self._all_constants: Callable[[], dict[str, torch.Tensor]] = partial(constant_values, program, True, written)
        self.kept = Kept(program, frozen, written)
        """What the program keeps: weights, buffers and constants, and what is made of them alone."""
        self.reader = Reader(self.ranges, self.constants.values)
        """Reads what the program computes of positions and sizes."""
        # Each pair once: every layer has one, and mostly all have the same.
        self._lengths = tuple({(size_text(a), size_text(b)): (a, b) for a, b in _lengths(program)}.values())
        self.places = places_of(program)
        """Where each symbol stands in the inputs, for what is said of it."""
        self.ties: tuple[tuple[Any, Any], ...] = ()
        """Sizes that are taken to be equal, as they are in the sample, where nothing can be evaluated otherwise."""
        self.multiples = multiples_of(program.graph.nodes)
        self.derived = derived_sizes(program.graph.nodes)
        """What sizes have to be multiples of."""
        self._until = until

    @cached_property
    def frozen_reader(self) -> Reader:
        """Reads as if persistent buffers kept what they hold."""
        return Reader(self.ranges, self._all_constants())

    def check_time(self) -> None:
        """Raises: OutOfTime: the search took longer than it may."""
        if self._until is not None and time.perf_counter() > self._until:
            raise OutOfTime

    def evaluator(
        self,
        profile: int = 0,
        *,
        exact: bool = True,
        equal_sizes: Iterable[tuple[Any, Any]] = (),
        preset: dict[Any, int] | None = None,
    ) -> Evaluator:
        pairs = (*self._lengths, *equal_sizes, *self.ties)
        sizes = Sizes(
            self.ranges, profile, preset=preset, equal_sizes=pairs, multiples=self.multiples, derived=self.derived
        )
        found = Evaluator(sizes, exact=exact)
        found.accept = self.accept
        return found

    @contextmanager
    def tied(self, ties: tuple[tuple[Any, Any], ...]) -> Iterator[None]:
        """Within the block these sizes are equal."""
        before, self.ties = self.ties, ties
        try:
            yield
        finally:
            self.ties = before

    def content(self, node: Node) -> str:
        """What the node is computed from, spelled out: constants with what they hold, inputs by name."""
        return self.constants.content(node)

    def may_change(self, nodes: Iterable[Node]) -> list[str]:
        """The persistent buffers, by their paths, that keep the nodes from being constants."""
        return self.constants.may_change(nodes)

    def loaded(self, nodes: Iterable[Node]) -> list[str]:
        """The persistent buffers, by their paths, that the nodes are computed from, beside whatever else."""
        return self.constants.loaded(nodes)

    def is_fixed(self, node: Node) -> bool:
        """Is it made of constants alone, and of no size that may be another?"""
        self.read_leaves = True
        return self.constants.is_fixed(node)

    def one_number(self, node: Node, evaluator: Evaluator) -> torch.Tensor | None:
        """The node's value, if it is made of constants and one number throughout, at every size; else None."""
        if self.depends_on_input(node) or one_number(self.reader, node) is None:
            return None
        try:
            (value,) = self.leaf_values([node], evaluator, 0)
        except CannotEvaluate:
            return None
        return value


def _lengths(program: ExportedProgram) -> Iterator[tuple[Any, Any]]:
    """Lengths of values, and of the keys that they have to match.

    torch.export lets every cache have a symbol of its own: scaled_dot_product_attention does not compare the two.
    """
    for node in program.graph.nodes:
        if op_name(node) in ("scaled_dot_product_attention", "attention"):
            key, value = (node.args[i] if i < len(node.args) else None for i in (1, 2))
            if isinstance(key, Node) and isinstance(value, Node):
                yield _any(fake(value).shape[-2]), _any(fake(key).shape[-2])


def _any(value: Any) -> Any:
    """Sizes are typed `int` where they may be symbols."""
    return value
