"""What a pattern asks with: evaluators, draws, and the values that a program's constants and sizes give."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from operator import attrgetter
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from fxfuse.graph.blocks.wrapped import flattened
from fxfuse.graph.dead_vmap import vmaps_closed, with_brackets
from fxfuse.graph.region import Region
from fxfuse.graph.view import fake, is_random, is_size, mutated, op_name, size_text, static, tensor
from fxfuse.proof.evaluate import CannotEvaluate, Evaluator, draw, generator
from fxfuse.proof.multiples import multiples_of
from fxfuse.proof.positions.claims import one_number
from fxfuse.proof.positions.reader import Reader
from fxfuse.proof.sizes import Sizes, places_of, ranges_of
from fxfuse.recognise.kept import Kept
from fxfuse.state.mutations import mutations
from fxfuse.state.writes import Unclear, shares_storage, with_writes

_INDEXED = {"index": 0, "embedding": 0, "index_select": 0, "gather": 0, "take_along_dim": 0}
_LIMIT = 400


def may_change(buffers: Sequence[str]) -> str:
    """Why nothing is concluded from what these buffers hold, and what lets it be."""
    names = ", ".join(map(repr, buffers))
    are = f"the persistent buffer {names}" if len(buffers) == 1 else f"the persistent buffers {names}"
    return f"load_state_dict may change {are} (frozen=True takes it for a constant)"


class OutOfTime(Exception):
    """The search took longer than it may."""


class Questions:
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
        self._constants = _constants(program, frozen, written)
        self._unfrozen = {} if frozen else _persistent(program, written)
        self._all_constants: Callable[[], dict[str, torch.Tensor]] = partial(_constants, program, True, written)
        self.kept = Kept(program, frozen, written)
        """What the program keeps: weights, buffers and constants, and what is made of them alone."""
        self.reader = Reader(self.ranges, self._constants)
        """Reads what the program computes of positions and sizes."""
        # Each pair once: every layer has one, and mostly all have the same.
        self._lengths = tuple({(size_text(a), size_text(b)): (a, b) for a, b in _lengths(program)}.values())
        self.places = places_of(program)
        """Where each symbol stands in the inputs, for what is said of it."""
        self.ties: tuple[tuple[Any, Any], ...] = ()
        """Sizes that are taken to be equal, as they are in the sample, where nothing can be evaluated otherwise."""
        self.multiples = multiples_of(program.graph.nodes)
        """What sizes have to be multiples of."""
        self._until = until
        self._contents: dict[Node, str] = {}
        self.read_leaves = False
        """Set when an answer came from this program's own constants: it holds for no other region."""

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
        sizes = Sizes(self.ranges, profile, preset=preset, equal_sizes=pairs, multiples=self.multiples)
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
        found = self._contents.get(node)
        if found is None:
            try:
                ancestors = _ancestors([node])
            except CannotEvaluate:
                self._contents[node] = node.name
                return node.name
            for ancestor in ancestors:
                if ancestor not in self._contents:
                    self._contents[ancestor] = self._spelled(ancestor)
            found = self._contents[node]
        return found

    def _spelled(self, node: Node) -> str:
        constant = self._constants.get(node.name) if node.op == "placeholder" else None
        if constant is not None and not constant.is_meta:
            value = constant.detach().to("cpu").contiguous()
            held = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
            text = f"{value.dtype}{tuple(value.shape)}{hashlib.sha256(held).hexdigest()}"
        elif node.op != "call_function":
            text = f"{node.op} {node.name}"
        else:
            parts = torch.fx.node.map_arg(
                (node.args, dict(node.kwargs)),
                lambda n: self._contents.get(n) or str(n.meta.get("val", n.name) if is_size(n) else n.name),
            )
            written = f"|{node.name}" if mutated(node) else ""
            text = f"{node.target}{parts}{written}"
        return hashlib.sha256(text.encode()).hexdigest()

    def draws(
        self,
        nodes: Iterable[Node],
        evaluator: Evaluator,
        seed: int,
        *,
        limits: tuple[int, ...] = (),
        high: int | None = 4,
    ) -> list[torch.Tensor]:
        """Independent random values for each node; a node given twice (k that is v too) has one.

        Integers are below `high`; without one they are drawn over the whole range of their type.
        """
        gen = generator(seed)
        drawn: dict[Node, torch.Tensor] = {}
        wanted = list(nodes)
        for node in wanted:
            if node not in drawn:
                fixed = self._is_index(node)
                drawn[node] = (
                    self._fixed(node, evaluator) if fixed else draw(node, evaluator, gen, limits=limits, high=high)
                )
        return [drawn[node] for node in wanted]

    def _is_index(self, node: Node) -> bool:
        """An integer tensor that no input has a part in: a permutation or a repeat, not a draw."""
        kind = fake(node).dtype
        integer = not (kind.is_floating_point or kind.is_complex or kind == torch.bool)
        return integer and not self.depends_on_input(node)

    def _fixed(self, node: Node, evaluator: Evaluator) -> torch.Tensor:
        (value,) = self.leaf_values([node], evaluator, 0)
        return value

    def inputs(
        self, region: Region, evaluator: Evaluator, seed: int, *, from_leaves: bool, whole: bool = False
    ) -> list[torch.Tensor]:
        """Random sources, and others drawn freely or computed from the program's leaves.

        Args:
            whole: integers over the whole range of their type, where they index nothing.
        """
        below = (
            None
            if whole
            else region.integers_below
            if isinstance(region.integers_below, int)
            else region.integers_below(evaluator.sizes)
        )
        sources = self.draws(region.sources, evaluator, seed, limits=region.source_limits, high=below)
        others = (
            self.leaf_values(region.others, evaluator, seed + 1, cover=seed % 2 == 0, below=region.hidden_table_rows)
            if from_leaves
            else self.draws(region.others, evaluator, seed + 1, high=below)
        )
        if region.words:
            info, gen = torch.iinfo(sources[0].dtype), generator(seed + 2)
            every = torch.randint(info.min, info.max + 1, sources[0].shape, generator=gen, dtype=torch.int64)
            sources[0] = every.to(sources[0].dtype)
        drawn = sources + others
        if region.ascending:
            drawn = [
                t.sort(-1).values if n in region.ascending else t for n, t in zip(region.inputs, drawn, strict=True)
            ]
        return drawn

    def leaf_values(
        self, nodes: Iterable[Node], evaluator: Evaluator, seed: int, *, cover: bool = False, below: int | None = None
    ) -> list[torch.Tensor]:
        """Values of `nodes` computed from the program's own constants and from random inputs.

        Integer inputs (positions, ids) are drawn below the length of every table they index, and `below`; `cover`
        counts through them instead, so that a long enough sequence meets every row.

        Raises:
            CannotEvaluate: a leaf has no data (meta), or too much would have to be computed.
        """
        self.read_leaves = True
        wanted = list(nodes)
        ancestors = _ancestors(wanted)
        gen = generator(seed)
        high = min(_table_rows(ancestors), below or sys.maxsize)
        env: dict[Node, torch.Tensor] = {}
        for node in ancestors:
            if node.op != "placeholder" or tensor(node) is None:
                continue
            constant = self._constants.get(node.name)
            if constant is not None:
                if constant.is_meta:
                    raise CannotEvaluate(f"the constant {node.name} has no data (meta device)")
                copy = any(mutated(n) for n in ancestors)  # nothing is written to the caller's
                env[node] = constant.detach().to("cpu", evaluator.dtype(constant.dtype), copy=copy)
            elif cover and not fake(node).dtype.is_floating_point and fake(node).dtype != torch.bool:
                shape = evaluator.sizes.shape(node)
                count = torch.Size(shape).numel()
                env[node] = (torch.arange(count) % high).reshape(shape).to(fake(node).dtype)
            else:
                env[node] = draw(node, evaluator, gen, high=high)
        env.update({n: _attribute(n) for n in ancestors if n.op == "get_attr"})
        with vmaps_closed():
            values = evaluator.run([n for n in with_brackets(ancestors) if n.op == "call_function"], env)
        _check_views(ancestors, values)
        return [values[n] for n in wanted]

    def one_number(self, node: Node, evaluator: Evaluator) -> torch.Tensor | None:
        """The node's value, if it is made of constants and one number throughout, at every size; else None."""
        if self.depends_on_input(node) or one_number(self.reader, node) is None:
            return None
        try:
            (value,) = self.leaf_values([node], evaluator, 0)
        except CannotEvaluate:
            return None
        return value

    def may_change(self, nodes: Iterable[Node]) -> list[str]:
        """The persistent buffers, by their paths, that keep the nodes from being constants."""
        found: dict[str, None] = {}
        for node in nodes:
            try:
                leaves = [n for n in _ancestors([node]) if n.op == "placeholder" and tensor(n) is not None]
            except CannotEvaluate:
                continue
            unknown = [n.name for n in leaves if n.name not in self._constants]
            if unknown and all(name in self._unfrozen for name in unknown):
                found.update(dict.fromkeys(self._unfrozen[name] for name in unknown))
        return list(found)

    def loaded(self, nodes: Iterable[Node]) -> list[str]:
        """The persistent buffers, by their paths, that the nodes are computed from, beside whatever else."""
        try:
            return [self._unfrozen[n.name] for n in _ancestors(nodes) if n.name in self._unfrozen]
        except CannotEvaluate:
            return []

    def is_fixed(self, node: Node) -> bool:
        """Is it made of constants alone, and of no size that may be another?"""
        if self.depends_on_input(node):
            return False
        values = (n.meta.get("val") for n in _ancestors([node]))
        return not any(_is_symbolic(d) for v in values for d in (v.shape if isinstance(v, torch.Tensor) else (v,)))

    def depends_on_input(self, node: Node) -> bool:
        """Does the value depend on anything but constants and sizes?"""
        self.read_leaves = True
        try:
            ancestors = _ancestors([node])
        except CannotEvaluate:
            return True
        return any(
            is_random(n) or (n.op == "placeholder" and tensor(n) is not None and n.name not in self._constants)
            for n in ancestors
        )


def written_targets(program: ExportedProgram) -> frozenset[str]:
    """Buffers, parameters, constants and inputs that the program writes to."""
    return frozenset(str(m.target) for m in mutations(program))


def _constants(program: ExportedProgram, frozen: bool, written: frozenset[str]) -> dict[str, torch.Tensor]:
    """Buffers and lifted constants by placeholder name.

    Parameters are not constants: training changes them. Nor, unless `frozen`, are persistent buffers:
    `load_state_dict` does.
    """
    found: dict[str, torch.Tensor] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind not in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR) or spec.target in written:
            continue
        if spec.kind == InputKind.BUFFER and spec.persistent and not frozen:
            continue
        value: Any = program.state_dict.get(str(spec.target))
        if value is None:
            value = program.constants.get(str(spec.target))
        if isinstance(value, torch.Tensor):
            found[spec.arg.name] = value
    return found


def _persistent(program: ExportedProgram, written: frozenset[str]) -> dict[str, str]:
    """Persistent buffers that nothing writes to: their paths by the names of their placeholders."""
    return {
        spec.arg.name: str(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.kind == InputKind.BUFFER and spec.persistent and spec.target not in written
    }


def _lengths(program: ExportedProgram) -> Iterator[tuple[Any, Any]]:
    """Lengths of values, and of the keys that they have to match.

    torch.export lets every cache have a symbol of its own: scaled_dot_product_attention does not compare the two.
    """
    for node in program.graph.nodes:
        if op_name(node) in ("scaled_dot_product_attention", "attention"):
            key, value = (node.args[i] if i < len(node.args) else None for i in (1, 2))
            if isinstance(key, Node) and isinstance(value, Node):
                yield _any(fake(value).shape[-2]), _any(fake(key).shape[-2])


def _check_views(nodes: list[Node], values: Mapping[Node, Any]) -> None:
    """What was written to a view reached its base.

    Raises:
        CannotEvaluate: something was written to a copy here that is a view in the program.
    """
    if not any(mutated(n) for n in nodes):
        return
    for node in nodes:
        base = values.get(node.args[0]) if shares_storage(node) else None  # type: ignore[arg-type]
        if (
            isinstance(base, torch.Tensor)
            and base.untyped_storage().data_ptr() != values[node].untyped_storage().data_ptr()
        ):
            raise CannotEvaluate(f"{node.name} is a copy at the probed sizes, and no view")


def _is_symbolic(value: Any) -> bool:
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def _attribute(node: Node) -> Any:
    """The constant that a node refers to."""
    return attrgetter(str(node.target))(node.graph.owning_module)


def _ancestors(nodes: Iterable[Node]) -> list[Node]:
    """Everything that the tensors are computed from, writes in place included, in graph order.

    Raises:
        CannotEvaluate: too much, or it cannot be told.
    """
    try:
        return with_writes(nodes, _LIMIT)
    except Unclear as error:
        raise CannotEvaluate(str(error)) from error


def _any(value: Any) -> Any:
    """Sizes are typed `int` where they may be symbols."""
    return value


def _table_rows(nodes: Iterable[Node]) -> int:
    """The fewest rows of any table that is indexed: integer inputs below it are valid in all of them."""
    rows = []
    for node in flattened(nodes):
        if op_name(node) in _INDEXED:
            table = node.args[0]
            size = static(fake(table).shape[0]) if isinstance(table, Node) else None
            if size is not None:
                rows.append(size)
    return max(min(rows, default=64), 1)
