"""The pattern that an example makes: regions are asked whether they compute what it computes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, product
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.fx import Graph

from fxfuse.errors import FxfuseError
from fxfuse.graph.region import Region
from fxfuse.graph.view import GraphView, is_pure, tensor
from fxfuse.ops.outside import OutsideOp
from fxfuse.proof.evaluate import CannotEvaluate
from fxfuse.recognise.answers import NEAR, Form, Found, Input, Proposal, Reason
from fxfuse.recognise.by_example.binding import SAME, Binder, Order, apart
from fxfuse.recognise.by_example.lazily import results_of
from fxfuse.recognise.by_example.outputs import covers, with_others
from fxfuse.recognise.by_example.refusals import checked, unfit
from fxfuse.recognise.by_example.regions import MAX_STATES, Searched, regions
from fxfuse.recognise.catalogue import unregister
from fxfuse.recognise.literals import literals
from fxfuse.recognise.probe import Probe

MAX_NUMBERS = 512
"""Ways to give the example numbers of the region, at most."""
_NEARLY = 0.3
"""Values that are apart by less than this part of their size are worth telling."""
_NUMBER = (int, float)

Bound = tuple[Order, dict[str, Any], int]
"""The order of the inputs, the numbers, and how many results the example gives."""


@dataclass(frozen=True)
class _Draws:
    """Values of a region's inputs, and what it gives for them, at several magnitudes."""

    pairs: tuple[tuple[list[Tensor], list[Tensor]], ...]


class Example:
    """A pattern given by example. Calling it calls the example.

    Args:
        function: what it computes, in plain PyTorch: tensors by position, numbers as parameters with a default. It
            gives a tensor or a tuple of tensors, one of which at least is computed of all its tensors.
        replacement: called with the same arguments in its place: an op, or a function of ops.
        operator: what the report calls it; the function's name by default.
        ulp: bound on the difference in the region's own dtype.
        decomposition: what the replacement is written out as; see `fxfuse.pattern`.
        check: may refuse a region by its inputs; see `fxfuse.pattern`.
    """

    since_opset = 23

    def __init__(
        self,
        function: Callable[..., Any],
        replacement: Callable[..., Any],
        operator: str | None,
        ulp: float,
        *,
        decomposition: Callable[..., Any] | None = None,
        check: Callable[..., str | None] | None = None,
    ) -> None:
        parameters = inspect.signature(function).parameters.values()
        self.scalars = {p.name: p.default for p in parameters if isinstance(p.default, _NUMBER)}
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
        self.decomposition = decomposition
        self.check = check
        self.entry: OutsideOp | None = None
        """What the replacement is in ONNX and in ATen, while the pattern is registered."""
        self._met: WeakSet[Graph] = WeakSet()
        """Graphs in which a region computed it."""
        self._results: int | None = None
        """How many results it gives, once it has run."""
        self.__doc__ = function.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def unregister(self) -> None:
        """Take it out of the catalogue, and its operator out of the tables of `fxfuse.onnx` and `fxfuse.unfuse`."""
        unregister(self)

    def propose(self, view: GraphView, ask: Probe) -> Iterator[Proposal]:
        """Every value of the graph, with regions before it."""
        searched = Searched()
        anchor = None
        for node in view.nodes:
            if tensor(node) is not None and is_pure(node):
                anchor = node
                yield Proposal(node, self._regions(view, node, ask, searched))
        if anchor is not None and searched.bounded and view.graph not in self._met:
            yield Proposal(
                anchor,
                (),
                missed=Reason(
                    f"nothing was found that computes {self.name}, but not all was asked: before {searched.bounded} of "
                    f"{searched.values} values the search ended at its bound of {MAX_STATES} regions",
                    NEAR,
                ),
            )

    def recognise(self, region: Region, ask: Probe) -> Found | Reason:
        bound = self._bound(region, ask)
        if isinstance(bound, Reason):
            return bound
        order, scalars, _ = bound
        self._met.add(region.view.graph)
        if (why := self._refusal(region, bound, ask)) is not None:
            return Reason(why, NEAR)
        meaning = self._form(self.function, bound)
        also: tuple[tuple[str, Form], ...] = ()
        if self.decomposition is not None:
            also = ((f"the decomposition of {self.name}", self._form(self.decomposition, bound)),)
        elif self.entry is not None:
            also = ((f"the example {self.name}", meaning),)
        return Found(
            self.operator,
            {**{n: Input(i) for n, i in zip(self.tensors, order.inputs, strict=True)}, **scalars},
            (self._form(self.replacement, bound),),
            rank=len(region.nodes),  # a cast or a scale before it goes too
            ulp=self.ulp,
            meaning=meaning,
            also=also,
        )

    def _refusal(self, region: Region, bound: Bound, ask: Probe) -> str | None:
        """Why a region that computes the example, or some of its results, is left as it is."""
        order, scalars, count = bound
        (inputs, _), *_ = self._draws(region, ask).pairs
        given = [inputs[i] for i in order.inputs]
        if count > 1 and not covers(lambda *t: self.function(*t, **scalars), given, order.results):
            return f"computes only a part of what {self.name} computes"
        if self.decomposition is not None:
            why = unfit(self.name, self.function, self.decomposition, given, scalars)
            if why is not None:
                return why
        return None if self.check is None else checked(self.name, self.check, region, order.inputs, scalars)

    def _regions(self, view: GraphView, node: Any, ask: Probe, searched: Searched) -> Iterator[Region]:
        """Regions before one value; where they compute one of several results, first with the others."""
        for region in regions(view, node, len(self.tensors), searched):
            if self._results != 1:
                joined = self._joined(region, ask)
                if joined is not None:
                    yield joined
            yield region

    def _joined(self, region: Region, ask: Probe) -> Region | None:
        bound = self._bound(region, ask)
        if isinstance(bound, Reason) or bound[2] == 1:
            return None
        order, scalars, _ = bound
        (inputs, _), *_ = self._draws(region, ask).pairs
        results = results_of(self.function(*(inputs[i] for i in order.inputs), **scalars))
        assert results is not None
        others = [r for place, r in enumerate(results) if place not in order.results]
        return with_others(
            region,
            ask.evaluator(0),
            inputs,
            others,
            lambda a, b: a.shape == b.shape and a.dtype == b.dtype and apart(a, b) < SAME,
        )

    def _bound(self, region: Region, ask: Probe) -> Bound | Reason:
        """Which tensors and numbers of the region are which parameters; or what it is not. Asked once for regions that
        look the same, unless the answer rests on what the program's constants hold."""
        key = ("bound", id(self), region.key, bool(ask.ties))
        if key not in ask.settled:
            before, ask.read_leaves = ask.read_leaves, False
            try:
                answer = self._asked(region, ask)
            except CannotEvaluate as error:
                answer = Reason(str(error))
            own, ask.read_leaves = ask.read_leaves, before or ask.read_leaves
            if own:
                return answer
            ask.settled[key] = answer
        found: Bound | Reason = ask.settled[key]
        return found

    def _asked(self, region: Region, ask: Probe) -> Bound | Reason:
        evaluator = ask.evaluator(0)
        nearest, raised, exhausted = float("inf"), None, False
        draws: _Draws | None = None
        almost: Bound | None = None
        choices = list(islice(self._numbers(region), MAX_NUMBERS + 1))

        def draw(number: int) -> list[Tensor]:
            seed = 11 + 4 * number if number >= 0 else 13 - 4 * number
            return self._drawn(region, ask, seed)

        for scalars in choices[:MAX_NUMBERS]:
            ask.check_time()
            binder = Binder(
                lambda tensors: evaluator.outputs(region, tensors),
                lambda *tensors, scalars=scalars: self.function(*tensors, **scalars),
                draw,
            )
            for order in binder.orders():
                draws = draws or self._draws(region, ask)
                error, ordinary = self._apart(draws, order, scalars)
                if math.isfinite(error):
                    ask.settled["ran", id(self)] = True
                if error < SAME:
                    return order, scalars, binder.results
                if ordinary:
                    almost = almost or (order, scalars, binder.results)
                nearest = min(nearest, error)
            nearest, exhausted = min(nearest, binder.nearest), exhausted or binder.exhausted
            if binder.ran:
                ask.settled["ran", id(self)] = True
                self._results = binder.results or self._results
            raised = binder.raised or raised
        if almost is not None:
            return almost  # the proof says where they differ
        if nearest < _NEARLY:
            return Reason(
                f"computes nearly the same as {self.name}: values differ by {nearest:.2g} of their size", NEAR
            )
        if exhausted or len(choices) > MAX_NUMBERS:
            what = "which tensor is which" if exhausted else f"its numbers: there are more than {MAX_NUMBERS} ways"
            return Reason(f"could not be compared with {self.name} in every way: too many to tell {what}", NEAR)
        if raised is not None:
            ask.settled.setdefault(("raised", id(self)), raised)
        return Reason("computes something else")

    def _apart(self, draws: _Draws, order: Order, scalars: dict[str, Any]) -> tuple[float, bool]:
        """How far apart the two are at most, relative to the largest value; and are they the same on ordinary
        numbers?"""
        error = 0.0
        for number, (inputs, expected) in enumerate(draws.pairs):
            try:
                with torch.no_grad():
                    actual = results_of(self.function(*(inputs[i] for i in order.inputs), **scalars))
            except Exception:
                return float("inf"), False
            if actual is None:
                return float("inf"), False
            for value, place in zip(expected, order.results, strict=True):
                alike = actual[place].shape == value.shape
                error = max(error, apart(value, actual[place]) if alike else float("inf"))
            if error >= SAME:
                return error, number > 0
        return error, True

    def _draws(self, region: Region, ask: Probe) -> _Draws:
        """Inputs of the region at several magnitudes, and what it gives for them."""
        evaluator = ask.evaluator(0)
        pairs = []
        for number, scale in enumerate((1.0, 1e-3, 1e-6, 1e3)):
            inputs = self._drawn(region, ask, 1 + 2 * number, scale)
            pairs.append((inputs, evaluator.outputs(region, inputs)))
        return _Draws(tuple(pairs))

    def _drawn(self, region: Region, ask: Probe, seed: int, scale: float = 1.0) -> list[Tensor]:
        """Inputs with which the region can be run; whole numbers of any size, where they index nothing."""
        evaluator = ask.evaluator(0)
        for whole in (True, False):
            inputs = ask.inputs(region, evaluator, seed, from_leaves=False, whole=whole)
            inputs = [t * scale if t.is_floating_point() else t for t in inputs]
            if not whole or all(t.is_floating_point() for t in inputs):
                break
            try:
                evaluator.outputs(region, inputs)
                break
            except CannotEvaluate:
                continue
        return inputs

    def _numbers(self, region: Region) -> Iterator[dict[str, Any]]:
        """Ways to choose the example's numbers among those of the region, and its defaults."""
        written = sorted(literals(region))
        choices = []
        for default in self.scalars.values():
            kind = type(default)
            fit = [kind(v) for v in written if kind(v) == v and kind(v) != default]
            choices.append([default, *dict.fromkeys(fit)] if kind is not bool else [default, not default])
        for values in product(*choices):
            yield dict(zip(self.scalars, values, strict=True))

    def _form(self, function: Callable[..., Any], bound: Bound) -> Form:
        order, scalars, count = bound

        def replaced(*inputs: Tensor) -> Any:
            result = function(*(inputs[i] for i in order.inputs), **scalars)
            if count == 1:
                return result
            if not isinstance(result, (tuple, list)) or len(result) != count:
                given = len(result) if isinstance(result, (tuple, list)) else 1
                raise FxfuseError(
                    f"gives {given} results where the example gives {count}", where=f"pattern {self.name}"
                )
            chosen = tuple(result[place] for place in order.results)
            return chosen if len(chosen) > 1 else chosen[0]

        return replaced
