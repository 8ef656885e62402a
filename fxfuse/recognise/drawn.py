"""Values to run a region with: drawn at random, or computed from a program's constants and inputs that are drawn."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch.fx import Node

from fxfuse.graph.blocks.wrapped import flattened
from fxfuse.graph.dead_vmap import vmaps_closed, with_brackets
from fxfuse.graph.region import Region
from fxfuse.graph.view import fake, mutated, op_name, static, tensor
from fxfuse.proof.evaluate import CannotEvaluate, Evaluator, draw, generator
from fxfuse.recognise.constants import Constants, ancestors_of
from fxfuse.state.writes import shares_storage

_INDEXED = {"index": 0, "embedding": 0, "index_select": 0, "gather": 0, "take_along_dim": 0}


class Draws:
    """Values for the nodes of one program.

    They are reproducible: of one seed there is one draw.
    """

    def __init__(self, constants: Constants) -> None:
        self.constants = constants
        self.read_leaves = False
        """Set when something was said of the program's own constants: an answer that rests on it holds for no other
        region. Who wants to know resets it first."""

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
        ancestors = ancestors_of(wanted)
        gen = generator(seed)
        high = min(_table_rows(ancestors), below or sys.maxsize)
        env: dict[Node, torch.Tensor] = {}
        for node in ancestors:
            if node.op != "placeholder" or tensor(node) is None:
                continue
            constant = self.constants.values.get(node.name)
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

    def depends_on_input(self, node: Node) -> bool:
        """Does the value depend on anything but constants and sizes?"""
        self.read_leaves = True
        return self.constants.depends_on_input(node)


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


def _attribute(node: Node) -> Any:
    """The constant that a node refers to."""
    return attrgetter(str(node.target))(node.graph.owning_module)


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
