"""What a mod computes, as an expression over the score, the indices and what was captured.

A mod is written for scalars. The same operators on broadcast grids, b as [B, 1, 1, 1], h as [1, H, 1, 1], q as
[1, 1, S, 1] and kv as [1, 1, 1, T], give all scores at once, each value only as large as what it depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxfuse.graph.view import is_random, op_name
from fxfuse.patterns.flex_attention.counting import Counted, counted
from fxfuse.torch_seams import MOD_INDEX, HigherOrderOperator, schema_of

INDICES = ("b", "h", "q", "kv")
_SAME = frozenset(
    ["lift_fresh_copy", "detach", "detach_", "alias", "clone", "contiguous", "view", "reshape", "squeeze", "expand"]
)
"""On scalars these change nothing."""
_COPIES = frozenset(["lift_fresh_copy", "detach", "detach_"])
"""What `torch.tensor([…])` in a mod is made of."""
_ELEMENTWISE = frozenset(["to", "_to_copy", "where", "floor_divide", "type_as"])
"""Elementwise, but not tagged so."""
_FILLED = {"new_ones": 1, "ones": 1, "ones_like": 1, "new_zeros": 0, "zeros": 0, "zeros_like": 0}
LOGICAL = frozenset(["__and__", "bitwise_and", "__or__", "bitwise_or", "__xor__", "bitwise_xor", "bitwise_not"])
"""What `table[i]` became: the graph has the class, or its name."""
OVER_DIMS = frozenset(["sum", "mean", "amax", "amin", "any", "all", "prod", "select", "softmax", "_softmax"])


class Unreadable(Exception):
    """A mod uses what has no meaning on grids; the message says what."""


@dataclass(frozen=True, eq=False)
class Expr:
    """One value of a mod: a leaf (no target), or an operator on other values."""

    target: Callable[..., Any] | None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    """None: a size, a Python number while tracing."""
    rank: int = 0
    """Of the value as the mod sees it: 0 but for rows of tables."""
    shape: tuple[Any, ...] = ()
    leaf: str = ""
    """``"score"``, an index, ``"score 0"`` for a captured value; ``"constant"``, whose value is in `args`."""
    counted: Counted | None = None
    """How a captured tensor counts along its dims, where it holds nothing else."""

    @cached_property
    def leaves(self) -> frozenset[str]:
        """The names of everything that it depends on."""
        found = frozenset([self.leaf]) if self.leaf and self.leaf != "constant" else frozenset()
        return found.union(*(child.leaves for child in self.children))

    @property
    def free(self) -> bool:
        """Depends on no position: one value, of whatever rank, computed as it stands."""
        return not self.leaves & {"score", *INDICES}

    @property
    def children(self) -> list[Expr]:
        found: list[Expr] = []
        _each((self.args, self.kwargs), found.append)
        return found

    def walk(self) -> Iterator[Expr]:
        """It and everything that it is made of, each once."""
        seen: set[Expr] = set()
        stack = [self]
        while stack:
            expr = stack.pop()
            if expr not in seen:
                seen.add(expr)
                yield expr
                stack.extend(expr.children)

    @cached_property
    def name(self) -> str:
        """The operator's name, ``"mul"``; ``""`` for leaves."""
        if self.target is None:
            return ""
        schema = schema_of(self.target)
        return str(schema.name.split("::")[1]) if schema is not None else getattr(self.target, "__name__", "")

    @property
    def number(self) -> float | int | bool | None:
        """Its value, where it is one number for all scores."""
        if self.leaf == "constant" and self.args[0].numel() == 1:
            return self.args[0].item()  # type: ignore[no-any-return]
        return None

    @property
    def whole_number(self) -> int | bool | None:
        """`number`, where it is exact in every type."""
        floating = self.dtype is None or self.dtype.is_floating_point or self.dtype.is_complex
        return self.number if self.rank == 0 and not floating else None  # type: ignore[return-value]


def leaf(name: str, dtype: torch.dtype | None, shape: tuple[Any, ...] = ()) -> Expr:
    return Expr(None, dtype=dtype, rank=len(shape), shape=shape, leaf=name)


def constant(value: torch.Tensor) -> Expr:
    return Expr(None, (value,), dtype=value.dtype, rank=value.dim(), shape=tuple(value.shape), leaf="constant")


def call(target: Callable[..., Any], *args: Any, dtype: torch.dtype | None) -> Expr:
    """An operator on scalars, of this type."""
    return Expr(target, args, dtype=dtype)


def captured(kind: str, values: Sequence[Any], *, count: bool = True) -> list[Expr]:
    """Leaves for what a mod captured: ``"score 0"``, ``"score 1"``, …; `count`: with how they count."""
    found = []
    for i, value in enumerate(values):
        fake: Any = value.meta.get("val") if isinstance(value, Node) else value
        if isinstance(fake, torch.Tensor):
            own = leaf(f"{kind} {i}", fake.dtype, tuple(fake.shape))
            found.append(replace(own, counted=counted(value)) if count else own)
        else:
            found.append(leaf(f"{kind} {i}", None))
    return found


def expression(mod: GraphModule, inputs: Sequence[Expr]) -> Expr:
    """What the mod returns, in terms of `inputs`.

    Raises:
        Unreadable: it calls what has no meaning on grids.
    """
    env: dict[Node, Any] = {}
    given = iter(inputs)
    for node in mod.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(given)
        elif node.op == "get_attr":
            value = getattr(mod, str(node.target), None)
            env[node] = constant(value) if isinstance(value, torch.Tensor) else value
        elif node.op == "output":
            (result,) = node.args if not isinstance(node.args[0], (tuple, list)) else node.args[0]
            return env[result]  # type: ignore[no-any-return]
        else:
            env[node] = _read(node, env)
    raise Unreadable("it returns nothing")


def _read(node: Node, env: Mapping[Node, Any]) -> Any:
    args: Any = map_arg(node.args, env.__getitem__)
    kwargs = map_arg(dict(node.kwargs), env.__getitem__)
    value = node.meta.get("val")
    dtype = value.dtype if isinstance(value, torch.Tensor) else None
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
    rank = len(shape)
    name = op_name(node)
    full = str(node.target)
    if full == "flat_apply":
        called = [
            i for i, arg in enumerate(node.args) if arg == MOD_INDEX or getattr(arg, "__name__", "") == "ModIndex"
        ]
        if not called:
            raise Unreadable("it calls an autograd.Function")
        table, *indices = args[called[0] + 1 :]
        place = _place(table, indices)
        if place is not None:
            return place
        return Expr(torch.ops.aten.index.Tensor, (table, tuple(indices)), dtype=dtype, rank=rank, shape=shape)
    if full.startswith("approx.tanh"):  # attention-gym's, which is tanh but for a faster instruction on GPUs
        return Expr(torch.ops.aten.tanh.default, args, dtype=dtype, rank=rank)
    if isinstance(node.target, HigherOrderOperator):
        raise Unreadable(f"it calls {full}")
    if name in ("searchsorted", "bucketize"):
        return _found(name, args, kwargs, dtype)
    if name in _COPIES and isinstance(args[0], Expr) and args[0].leaf == "constant":
        return args[0]
    if rank == 0 and name in _SAME and args and isinstance(args[0], Expr) and args[0].rank == 0:
        return args[0]
    if rank == 0 and name in ("to", "_to_copy", "type_as") and dtype is not None and args[0].dtype == dtype:
        return args[0]
    if rank == 0 and (fill := _filled(name, args)) is not None:
        return constant(torch.tensor(fill, dtype=dtype))
    tags: Any = getattr(node.target, "tags", ())
    known = torch.Tag.pointwise in tags or name in _ELEMENTWISE or name in LOGICAL
    known = known or name in OVER_DIMS or name == "index" or dtype is None  # a size
    operands: list[Expr] = []
    _each((args, kwargs), operands.append)
    free = all(x.free for x in operands) and not is_random(node)
    # Of what varies with positions neither a size nor a Python number is asked.
    known = free or (known and (dtype is not None or all(x.dtype is None for x in operands)))
    schema = schema_of(node.target)
    if not known or (schema is not None and schema.is_mutable):
        raise Unreadable(f"it calls {full}")
    target: Any = node.target
    whole = rank == 0 and dtype is not None and not dtype.is_floating_point and not dtype.is_complex
    if whole and operands and not is_random(node) and all(x.whole_number is not None for x in operands):
        return constant(target(*_numbers(args), **_numbers(kwargs)))
    return Expr(target, args, kwargs, dtype=dtype, rank=rank, shape=shape)


def _found(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: torch.dtype | None) -> Expr:
    """Where a number stands in a sorted row: how many of the row are below it. ONNX has no search."""
    row, value = args[:2] if name == "searchsorted" else args[1::-1]
    plain = isinstance(row, Expr) and row.rank == 1 and isinstance(value, Expr) and value.rank == 0
    if not plain or len(args) > 2 or kwargs.get("sorter") is not None:
        raise Unreadable(f"it calls {name}")
    right = kwargs.get("right") or kwargs.get("side") == "right"
    below = torch.ops.aten.le.Tensor if right else torch.ops.aten.lt.Tensor
    smaller = Expr(below, (row, value), dtype=torch.bool, rank=1, shape=row.shape)
    return Expr(torch.ops.aten.sum.dim_IntList, (smaller, [0]), dtype=dtype)


def _place(table: Any, indices: Sequence[Any]) -> Expr | None:
    """What stands at these places of a tensor that only counts; none of them may be counted from its end."""
    if not isinstance(table, Expr) or table.counted is None or len(indices) != len(table.counted.steps):
        return None
    if not all(isinstance(i, Expr) and i.rank == 0 and _natural(i) for i in indices):
        return None
    found: Expr | None = None
    for index, step in zip(indices, table.counted.steps, strict=True):
        if step:
            term = index if step == 1 else call(torch.ops.aten.mul.Tensor, index, step, dtype=torch.int64)
            found = term if found is None else call(torch.ops.aten.add.Tensor, found, term, dtype=torch.int64)
    start = table.counted.start
    if found is None:
        return constant(torch.tensor(start, dtype=table.dtype))
    return call(torch.ops.aten.add.Tensor, found, start, dtype=torch.int64) if start else found


def _natural(index: Expr) -> bool:
    """An index, and what is added to it, if that is not negative."""
    if index.leaf in INDICES:
        return True
    if index.name == "add" and not index.kwargs and len(index.args) == 2:
        first, second = index.args
        return isinstance(first, Expr) and _natural(first) and isinstance(second, int) and second >= 0
    return False


def _numbers(arg: Any) -> Any:
    """Constants as what they are."""
    if isinstance(arg, Expr):
        return arg.args[0]
    if isinstance(arg, (list, tuple)):
        return type(arg)(_numbers(a) for a in arg)
    if isinstance(arg, Mapping):
        return {key: _numbers(a) for key, a in arg.items()}
    return arg


def _filled(name: str, args: Sequence[Any]) -> Any:
    if name in _FILLED:
        return _FILLED[name]
    position = {"new_full": 2, "full": 1, "full_like": 1, "scalar_tensor": 0}.get(name)
    value = args[position] if position is not None and len(args) > position else None
    return value if isinstance(value, (int, float, bool)) else None


def _each(arg: Any, found: Callable[[Expr], None]) -> None:
    if isinstance(arg, Expr):
        found(arg)
    elif isinstance(arg, (list, tuple)):
        for a in arg:
            _each(a, found)
    elif isinstance(arg, Mapping):
        for a in arg.values():
            _each(a, found)
