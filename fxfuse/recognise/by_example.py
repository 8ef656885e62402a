"""A user's pattern: a plain function says what is meant, an op replaces whatever computes the same.

    @fxfuse.pattern(replacement=torch.ops.mine.geglu)
    def geglu(x, w_gate, w_up):
        return F.gelu(x @ w_gate.T) * (x @ w_up.T)

A region matches when it gives the same values as the function on the same inputs: its tensors are bound to the
parameters in whichever order fits, parameters with a number as default to the numbers written in the region.
"""

from __future__ import annotations

import heapq
import inspect
import itertools
from collections.abc import Callable, Iterator
from itertools import islice, permutations, product
from typing import Any

import torch
from torch.fx import Node

from fxfuse.errors import FxfuseError
from fxfuse.graph.region import Region, between
from fxfuse.graph.view import GraphView, is_float, is_pure, op_name, tensor
from fxfuse.proof.evaluate import CannotEvaluate
from fxfuse.recognise.answers import Found, Input, Proposal, Reason
from fxfuse.recognise.catalogue import register
from fxfuse.recognise.literals import literals
from fxfuse.recognise.questions import Questions

MAX_NODES = 24
_MAX_REGIONS = 192
_MAX_BINDINGS = 512


class Example:
    """A pattern given by example. Calling it calls the example.

    Args:
        function: what it computes, in plain PyTorch: tensors by position, numbers as parameters with a default.
        replacement: called with the same arguments in its place: an op, or a function of ops.
        operator: what the report calls it; the function's name by default.
        ulp: bound on the difference in the region's own dtype.
    """

    since_opset = 23

    def __init__(
        self, function: Callable[..., torch.Tensor], replacement: Callable[..., Any], operator: str | None, ulp: float
    ) -> None:
        parameters = inspect.signature(function).parameters.values()
        self.scalars = {p.name: p.default for p in parameters if isinstance(p.default, (int, float))}
        self.tensors = [p.name for p in parameters if p.name not in self.scalars]
        if not self.tensors or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            raise FxfuseError(
                "a pattern needs named parameters, at least one of them a tensor",
                where=f"pattern {function.__name__}",
                hint="write one parameter per tensor, and numbers with a default: def f(x, w, eps=1e-5)",
            )
        self.function = function
        self.replacement = replacement
        self.name = function.__name__
        self.operator = operator or function.__name__
        self.ulp = ulp
        self.__doc__ = function.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.function(*args, **kwargs)

    def propose(self, view: GraphView, ask: Questions) -> Iterator[Proposal]:
        """Every float node with the regions before it; of nodes that look the same MAX_NODES back only one is asked,
        unless it matched."""
        for node in view.nodes:
            if is_float(node) and is_pure(node):
                yield Proposal(node, _regions(view, node, len(self.tensors)))

    def recognise(self, region: Region, ask: Questions) -> Found | Reason:
        draws = list(self._draws(region, ask))
        best = float("inf")
        raised: Exception | None = None
        for order, scalars in islice(self._bindings(region), _MAX_BINDINGS):
            ask.check_time()
            error = 0.0
            for inputs, expected in draws:
                try:
                    with torch.no_grad():
                        actual = self.function(*(inputs[i] for i in order), **scalars)
                except Exception as problem:  # of tensors in the wrong order, say
                    raised = problem
                    break
                ask.settled["ran", id(self)] = True
                if not isinstance(actual, torch.Tensor) or actual.shape != expected.shape:
                    break
                error = max(error, _apart(expected, actual))
                if error >= 1e-9:
                    best = min(best, error)
                    break
            else:
                parameters: dict[str, Any] = {n: Input(i) for n, i in zip(self.tensors, order, strict=True)}
                form = self._form(self.replacement, order, scalars)
                meaning = self._form(self.function, order, scalars)
                return Found(self.operator, {**parameters, **scalars}, (form,), ulp=self.ulp, meaning=meaning)
        if best < 0.3:
            return Reason(f"computes nearly the same as {self.name}: values differ by {best:.2g} of their size", 2)
        if raised is not None:
            ask.settled.setdefault(("raised", id(self)), raised)
        return Reason("computes something else")

    def _draws(self, region: Region, ask: Questions) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
        """Inputs of the region at several magnitudes, and what it gives for them."""
        evaluator = ask.evaluator(0)
        for number, scale in enumerate((1.0, 1e-3, 1e-6, 1e3)):
            for whole in (True, False):
                inputs = ask.inputs(region, evaluator, 1 + 2 * number, from_leaves=False, whole=whole)
                inputs = [t * scale if t.is_floating_point() else t for t in inputs]
                try:
                    yield inputs, evaluator.region(region, inputs)
                    break
                except CannotEvaluate:
                    if not whole:
                        raise

    def _bindings(self, region: Region) -> Iterator[tuple[tuple[int, ...], dict[str, float]]]:
        numbers = sorted(literals(region))
        choices = [
            [*(type(default)(v) for v in numbers if type(default)(v) != default), default]
            for default in self.scalars.values()
        ]
        for values in product(*choices):
            for order in permutations(range(len(self.tensors))):
                yield order, dict(zip(self.scalars, values, strict=True))

    def _form(
        self, function: Callable[..., Any], order: tuple[int, ...], scalars: dict[str, float]
    ) -> Callable[..., torch.Tensor]:
        def replaced(*inputs: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = function(*(inputs[i] for i in order), **scalars)
            return result

        return replaced


def _apart(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """How far apart they are, relative to the largest; what is exact to say is said by the proof."""
    size = expected.double().abs().max().clamp(min=1e-300)
    return float((actual.double() - expected.double()).abs().max() / size)


def pattern(
    *, replacement: Callable[..., Any], operator: str | None = None, ulp: float = 4.0
) -> Callable[[Callable[..., torch.Tensor]], Example]:
    """Register a pattern by example; see the module. Give `patterns=[...]` to `fuse` to use only some.

    Args:
        replacement: an op or function that takes the example's arguments and computes the same.
        operator: what the report calls it.
        ulp: bound on the difference in the region's own dtype, in units in the last place.

    Raises:
        FxfuseError: the example's signature cannot be bound, or the replacement cannot be called.
    """
    if not callable(replacement):
        raise FxfuseError(f"the replacement cannot be called: {replacement!r}", where="replacement")

    def decorate(function: Callable[..., torch.Tensor]) -> Example:
        example = Example(function, replacement, operator, ulp)
        register(example)
        return example

    return decorate


def _regions(view: GraphView, output: Node, count: int) -> Iterator[Region]:
    """Regions that end at `output` and read exactly `count` tensors, small ones first.

    Of the many ways to grow, those that read about as many tensors as are wanted come first: the rest of a deep model
    lies behind every input.
    """
    first, read = frozenset({output}), frozenset(_reads(output))
    numbers = itertools.count()
    states = [(0, next(numbers), first, read)]
    seen = {first}
    while states:
        _, number, inside, cut = heapq.heappop(states)
        if number > _MAX_REGIONS:
            return
        if len(cut) == count:
            region = between(view, output, view.sorted(cut), lambda _: True, limit=MAX_NODES)
            if region is not None and not region.others and set(region.nodes) <= inside:
                yield region
        for node in view.sorted(cut)[::-1]:
            grown = inside | {node}
            if len(grown) > MAX_NODES:
                break
            if grown in seen or not is_pure(node) or op_name(node) == "":
                continue
            seen.add(grown)
            behind = (cut - {node}) | frozenset(i for i in _reads(node) if i not in grown)
            heapq.heappush(states, (len(grown) + 3 * abs(len(behind) - count), next(numbers), grown, behind))


def _reads(node: Node) -> list[Node]:
    """The values, not the sizes, that a node is computed from."""
    return [i for i in node.all_input_nodes if tensor(i) is not None or isinstance(i.meta.get("val"), (list, tuple))]
