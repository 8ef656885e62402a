"""Regions evaluated as black boxes: on real tensors, at small sizes, in float64 or in their own dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from fxfuse.graph.blocks.wrapped import Wrapped, wrapped
from fxfuse.graph.higher_order import higher_order
from fxfuse.graph.region import Region
from fxfuse.graph.source import place_of
from fxfuse.graph.view import ASSERTIONS, CAST, UNSET, argument, fake, op_name
from fxfuse.proof.accepted import BOUNDS
from fxfuse.proof.analytic import ACCUMULATES, MOVED
from fxfuse.proof.breaks import Breaks
from fxfuse.proof.dequantize import exactly
from fxfuse.proof.sizes import Sizes
from fxfuse.proof.special import default_epsilon, is_complex, rounded_count, unset

MAX_ELEMENTS = 1 << 25
"""Largest tensor that a question may allocate (256 MiB in float64)."""


class CannotEvaluate(Exception):
    """The region cannot be run on its own here; the message says why."""


class Evaluator:
    """Runs nodes of an export graph on real CPU tensors.

    Args:
        sizes: the size that each symbol stands for.
        exact: in float64, every cast between floating types ignored: what the region *computes*.
            Otherwise in the dtypes of the graph: how it *rounds*.
    """

    def __init__(self, sizes: Sizes, *, exact: bool = True) -> None:
        self.sizes = sizes
        self.exact = exact
        self.breaks: Breaks | None = None
        """Where every call of a break is recorded, if anywhere."""
        self.accept: frozenset[str] = frozenset()
        """Breaks that are evaluated as if they were not there, by name."""
        self._noise: tuple[float, torch.Generator] | None = None
        self._rounds: torch.Generator | None = None
        self._affordable: set[Node] = set()

    def noisy(self, size: float, sample: int) -> Evaluator:
        """One that puts every value that it computes off by a random part of `size`, relatively."""
        other = Evaluator(self.sizes, exact=self.exact)
        other.accept = self.accept
        other._noise = size, generator(7000 + sample)
        return other

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        if self.exact and dtype.is_floating_point:
            return torch.float64
        return torch.complex128 if self.exact and dtype.is_complex else dtype

    def run(
        self, nodes: Iterable[Node], env: Mapping[Node, Any], aliases: Mapping[Node, Node] | None = None
    ) -> dict[Node, Any]:
        """Values of `nodes` (in graph order) given `env`; `aliases` maps a node to the equal one that `env` holds."""
        values = dict(env)
        aliases = aliases or {}
        with torch.no_grad():
            for node in nodes:
                if node not in values:
                    values[node] = self._call(node, values, aliases)
        return values

    def region(self, region: Region, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The region's output for these values of `region.inputs`."""
        return self.outputs(region, inputs)[0]

    def outputs(self, region: Region, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All of `region.outputs` for these values of `region.inputs`."""
        env = dict(zip(region.inputs, inputs, strict=True))
        values = self.run(region.nodes, env, _aliases(region))
        outputs = [values[node] for node in region.outputs]
        if not all(isinstance(out, torch.Tensor) for out in outputs):
            raise CannotEvaluate("the region's output is not a tensor")
        return outputs

    def _call(self, node: Node, values: dict[Node, Any], aliases: Mapping[Node, Node]) -> Any:
        def concrete(n: Node) -> Any:
            if n in values:
                return values[n]
            if n in aliases:
                return values[aliases[n]]
            value = n.meta.get("val")
            if isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)):
                return self.sizes(value)
            raise CannotEvaluate(f"{node.name} reads {n.name}, which has no value here")

        name = op_name(node)
        if node.op != "call_function" or name in ASSERTIONS:
            return None
        if (inside := wrapped(node)) is not None:
            return self._run_inside(inside, map_arg(tuple(inside.operands), concrete))
        if (known := higher_order(node)) is not None:
            return known.evaluate(node, concrete, self)
        if node not in self._affordable:
            if math.prod(_shape(node, self.sizes)) > MAX_ELEMENTS:
                raise CannotEvaluate(f"{node.name} is too large to evaluate: {list(_shape(node, self.sizes))}")
            self._affordable.add(node)
        args = self.retype(map_arg(node.args, concrete))
        kwargs = self.retype(map_arg(dict(node.kwargs), concrete))
        if self._rounds is not None:
            args, kwargs = self._other_digits(args), self._other_digits(kwargs)
        if self._noise is not None and (name in ACCUMULATES or any(is_complex(a) for a in args)):
            args = tuple(self.put_off(a) for a in args)
        if self.exact and name in CAST and (rounded := rounded_count(node, args)) is not None:
            return self._seen(node, name, args, kwargs, rounded)
        if self.exact and node.target is torch.ops.aten.rms_norm.default and argument(node, "eps") is None:
            source = node.args[0]
            assert isinstance(source, Node)
            args = (*args[:3], *([None] * (3 - len(args))), default_epsilon(fake(source).dtype))
        target, given = exactly(node) if self.exact else (None, {})
        if node.target is torch.ops.aten.view.default:
            return args[0].reshape(args[1])  # which strides a tensor has makes no difference to what is computed
        try:
            value = self.upcast((target or node.target)(*args, **{**kwargs, **given}))  # type: ignore[operator]
            return self._seen(node, name, args, kwargs, unset(value) if name in UNSET else value)
        except CannotEvaluate:
            raise
        except Exception as error:  # any failure of a torch operator at these sizes is an answer, not a crash
            raise CannotEvaluate(f"{node.name} cannot run at the probed sizes: {error}") from error

    def with_other_digits(self, sample: int) -> Evaluator:
        """One in which every number that is written in the calls, and that float32 does not hold, is another one that
        rounds to the same float32: √(2/π) is written as 0.7978845608 here and as 0.79788456 there."""
        other = Evaluator(self.sizes, exact=self.exact)
        other.accept = self.accept
        other._rounds = generator(7500 + sample)
        return other

    def _other_digits(self, arg: Any) -> Any:
        if isinstance(arg, float) and math.isfinite(arg) and float(torch.tensor(arg, dtype=torch.float32)) != arg:
            return arg * (1 + 2.0**-24 * (2 * float(torch.rand((), generator=self._rounds)) - 1))
        if isinstance(arg, (list, tuple)):
            return type(arg)(self._other_digits(a) for a in arg)
        if isinstance(arg, dict):
            return {k: self._other_digits(v) for k, v in arg.items()}
        return arg

    def _seen(self, node: Node, name: str, args: Any, kwargs: Any, value: Any) -> Any:
        """Record which pieces of the call ran. Returns its value: disturbed, or without an accepted break, if asked."""
        if (
            self.accept
            and isinstance(value, torch.Tensor)
            and (without := self._accepted(node, name, args)) is not None
        ):
            value = without
        if self.breaks is not None:
            self.breaks.record(node, args, kwargs, value)
        if self._noise is not None and name not in MOVED and name not in CAST:
            value = self.put_off(value)
        return value

    def _accepted(self, node: Node, name: str, args: Any) -> torch.Tensor | None:
        """What an accepted break lets through: its operand, as if it had no bounds."""
        if name not in BOUNDS or f"{name}@{place_of(node)}" not in self.accept:
            return None
        first: torch.Tensor = args[0]
        return first

    def put_off(self, value: Any) -> Any:
        """The value off by a random part of what `noisy` was told; as it is where nothing was told."""
        if self._noise is None:
            return value
        size, gen = self._noise
        if isinstance(value, (list, tuple)):
            return type(value)(self.put_off(v) for v in value)
        if isinstance(value, torch.Tensor) and value.is_complex():
            return torch.view_as_complex(self.put_off(torch.view_as_real(value)))
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return value * (1 + size * (2 * torch.rand(value.shape, dtype=torch.float64, generator=gen) - 1))

    def _run_inside(self, inside: Wrapped, operands: Sequence[Any]) -> Any:
        """The results of a subgraph on these operands."""
        *nodes, output = inside.nodes
        placeholders = [n for n in nodes if n.op == "placeholder"]
        values = self.run(nodes, dict(zip(placeholders, operands, strict=True)))
        return map_arg(output.args[0], values.__getitem__)

    def function(self, graph: GraphModule) -> Callable[..., Any]:
        """What a subgraph computes, as a function that runs its nodes as this evaluator runs those of the graph."""
        return _Subgraph(graph, self).run

    def retype(self, arg: Any) -> Any:
        """Arguments as calls are run with them: floating dtypes are float64 where that is exact, devices the CPU, sizes
        numbers."""
        if isinstance(arg, torch.dtype):
            return self.dtype(arg)
        if isinstance(arg, torch.device):
            return torch.device("cpu")
        if isinstance(arg, torch.SymInt):
            return self.sizes(arg)
        if isinstance(arg, (list, tuple)):
            return type(arg)([self.retype(a) for a in arg])
        if isinstance(arg, dict):
            return {k: self.retype(v) for k, v in arg.items()}
        return arg

    def upcast(self, value: Any) -> Any:
        """Values as they are handed on: in float64 where that is exact."""
        if isinstance(value, torch.Tensor) and value.dtype != self.dtype(value.dtype):
            return value.to(self.dtype(value.dtype))
        if isinstance(value, (list, tuple)):
            return type(value)([self.upcast(v) for v in value])
        return value


class _Subgraph(Interpreter):
    """Runs a subgraph as the evaluator runs the graph that it is called from."""

    def __init__(self, graph: GraphModule, evaluator: Evaluator) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.evaluator = evaluator

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        retyped = self.evaluator.retype(args), self.evaluator.retype(kwargs)
        return self.evaluator.upcast(super().call_function(target, *retyped))


def draw(
    node: Node,
    evaluator: Evaluator,
    generator: torch.Generator,
    *,
    scale: float = 1.0,
    high: int | None = 4,
    limits: tuple[int, ...] = (),
) -> torch.Tensor:
    """Random valid values for a region input: normal floats times `scale`, integers below `high`, coin tosses.

    Without `high`, integers are drawn over the whole range of their type, or ±2²⁰ where that is wider.

    `limits` are the largest sizes by axis (`Region.source_limits`).

    In the graph's own dtypes the values are drawn in float64 and rounded, so that both modes see the same numbers.
    """
    value = fake(node)
    shape = evaluator.sizes.shape(node)
    if limits:
        shape = tuple(map(min, shape, limits))
    if math.prod(shape) > MAX_ELEMENTS:
        raise CannotEvaluate(f"input {node.name} is too large to draw: {list(shape)}")
    if value.dtype == torch.bool:
        drawn = torch.rand(shape, generator=generator) < 0.7
        if shape and shape[-1] > 1:  # as a mask, whichever way it is read, it leaves every row something
            drawn[..., 0], drawn[..., 1] = True, False
        return drawn
    if value.dtype.is_complex:
        parts = torch.randn((*shape, 2), dtype=torch.float64, generator=generator) * scale
        return torch.view_as_complex(parts).to(evaluator.dtype(value.dtype))
    if value.dtype.is_floating_point:
        drawn = torch.randn(shape, dtype=torch.float64, generator=generator) * scale
        return drawn.to(evaluator.dtype(value.dtype))
    if high is None:
        info = torch.iinfo(value.dtype)
        low, end = max(info.min, -(1 << 20)), min(info.max, 1 << 20) + 1
        return torch.randint(low, end, shape, generator=generator).to(value.dtype)
    return torch.randint(0, high, shape, generator=generator).to(value.dtype)


def generator(seed: int) -> torch.Generator:
    """A generator of its own: the caller's random state is never touched."""
    return torch.Generator().manual_seed(seed)


def _shape(node: Node, sizes: Sizes) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(sizes(d) for d in value.shape) if isinstance(value, torch.Tensor) else ()


def _aliases(region: Region) -> dict[Node, Node]:
    """Nodes the region reads that equal one of its inputs (two slices of one cache, say)."""
    held = set(region.inputs) | set(region.nodes)
    found = {}
    for node in region.nodes:
        for i in node.all_input_nodes:
            if i not in held and region.view.canonical(i) in held:
                found[i] = region.view.canonical(i)
    return found
