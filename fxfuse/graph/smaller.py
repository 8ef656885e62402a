"""A region over one large stored tensor, at fewer rows: what is asked of it and proven costs as much as a small one.

Weights have fixed sizes, and a region of them would be run at those: gigabytes for an embedding. Where every node
treats the rows of an axis alike (arithmetic element by element, casts, views), fewer rows say the same. The sizes that
are written in the calls are the axis's where they are that number; if they are another's, the copy does not run, and
there is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fxfuse.graph.emit import KEPT_META
from fxfuse.graph.region import Region
from fxfuse.graph.view import GraphView, argument, fake, is_size, op_name, size_text, tensor
from fxfuse.ops.arguments import differ
from fxfuse.torch_seams import entered

LARGE = 16
"""An axis of more rows than this is made smaller."""
MAX_ELEMENTS = 1 << 22
"""Where no axis can be made smaller, a region of at most so many elements is run as large as it is."""
_NOT_ALIKE = frozenset(["tensor_split", "take_along_dim", "gather", "flip", "roll"])
"""They take out rows by their number."""
_ALONG = frozenset(
    [
        "slice",
        "select",
        "narrow",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "unsafe_split",
        "unsafe_chunk",
        "index_select",
    ]
)
"""They take out rows along `dim` by their number, and treat those of every other axis alike."""


def _treats_rows_alike(node: Node) -> bool:
    if op_name(node) == "repeat_interleave":
        return isinstance(node.args[1], int)
    return op_name(node) not in _NOT_ALIKE


def smaller(
    region: Region, narrow: Mapping[Node, torch.dtype], fixed: Set[Node] = frozenset(), fits: Set[Node] = frozenset()
) -> Region | None:
    """A copy of the region with fewer rows of its source; None where there is none that is small enough.

    Args:
        narrow: inputs all of whose values are known to fit in an integer type: the copy takes them in that type, so
            that what is asked of all values is asked of those that may occur.
        fixed: inputs that keep what they hold in the program: by how much words are shifted.
        fits: sums and differences of integers that are known not to wrap around. The copy computes them in int32, where
            they do not for any other value of the inputs either.
    """
    (source, *_) = region.sources
    sizes = [tuple(fake(n).shape) for n in (*region.inputs, *region.nodes) if tensor(n) is not None]
    if not all(isinstance(size, int) for size in fake(source).shape):
        return None
    alike = all(_treats_rows_alike(n) for n in region.nodes)
    for axis, size in enumerate(fake(source).shape):
        taken = {size for shape in sizes for size in shape if isinstance(size, int)}
        rows = next((r for r in (5, 7, 11, 13) if r not in taken), 0)
        if alike and rows and size > LARGE and (copy := _copied(region, narrow, fixed, fits, axis, size, rows)):
            again = None
            if len(region.sources) > 1:  # a product also runs over the axis of the other source
                held = {c for n, c in zip(region.inputs, copy.inputs, strict=True) if n in fixed}
                again = smaller(copy, {}, held)
            return copy if again is None else replace(again, narrowed=copy.narrowed)
    return _copied(region, narrow, fixed, fits, 0, 0, 0) if fake(source).numel() <= MAX_ELEMENTS else None


def _copied(
    region: Region,
    narrow: Mapping[Node, torch.dtype],
    fixed: Set[Node],
    fits: Set[Node],
    axis: int,
    size: int,
    rows: int,
) -> Region | None:
    """The copy with `rows` for `size` along the source's `axis`; None where it does not run at those sizes."""
    mode = getattr(fake(region.sources[0]), "fake_mode", None)
    env = None if mode is None else mode.shape_env
    try:
        # The questions that operators ask of symbols here are of the copy: the program does not depend on the answers.
        with entered(mode), nullcontext() if env is None else env.suppress_guards():
            return _copy(region, narrow, fixed, fits, axis, size, rows)
    except Exception:  # whatever an operator raises at other sizes: this is no copy
        return None


def _copy(
    region: Region,
    narrow: Mapping[Node, torch.dtype],
    fixed: Set[Node],
    fits: Set[Node],
    axis: int,
    size: int,
    rows: int,
) -> Region | None:
    graph = Graph()
    env: dict[Node, Node] = {}
    inputs: list[Node] = []
    casts: list[Node] = []
    made: list[Node] = []
    for place, node in enumerate(region.inputs):
        shape = list(fake(node).shape)
        if place == 0 and size:
            shape[axis] = rows
        elif size and node not in fixed:
            shape = _fewer(shape, size, rows)
        given = graph.placeholder(node.name if node in fixed else f"fxfuse_small_{place}")
        kind = fake(node).dtype
        given.meta["val"] = torch.empty(shape, dtype=narrow.get(node, kind))
        inputs.append(given)
        env[node] = given
        if narrow.get(node, kind) != kind:
            env[node] = graph.call_function(torch.ops.aten.to.dtype, (given, kind))
            env[node].meta["val"] = torch.empty(shape, dtype=kind)
            casts.append(env[node])

    def found(node: Node) -> Any:
        if node not in env and is_size(node):
            return node.meta["val"]
        return env[node]

    def wide(given: Node) -> Node:
        """It in int32, where it is a byte or two."""
        if given.meta["val"].dtype not in (torch.int8, torch.uint8, torch.int16):
            return given
        cast = graph.call_function(torch.ops.aten.to.dtype, (given, torch.int32))
        cast.meta["val"] = given.meta["val"].to(torch.int32)
        made.append(cast)
        return cast

    for node in region.nodes:
        if any(differ(fake(n).shape[d], fake(env[n]).shape[d]) for n, d in _taken(node)):
            raise _NotAlike
        args, kwargs = (map_arg(_resized(a, size, rows), found) for a in (tuple(node.args), dict(node.kwargs)))
        if node in fits:
            args = tuple(wide(a) if isinstance(a, Node) else a for a in args)
        new = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        new.meta = {k: v for k, v in node.meta.items() if k in KEPT_META}
        values = map_arg((args, kwargs), lambda n: n.meta["val"])
        new.meta["val"] = node.target(*_on_cpu(values[0]), **_on_cpu(values[1]))  # type: ignore[operator]
        env[node] = new
        made.append(new)
    output = env[region.output]
    before, after = tuple(fake(region.output).shape), tuple(fake(output).shape)
    changed = [(b, a) for b, a in zip(before, after, strict=True) if b is not a and not _same(b, a)]
    summed_over = len(region.sources) > 1 and not changed
    if size and not summed_over and (len(changed) != 1 or changed[0][0] * rows != changed[0][1] * size):
        return None
    graph.output(output)
    nodes = (*casts, *made)
    count = len(region.sources)
    given_inputs = tuple(inputs[:count]), tuple(inputs[count:])
    return Region(GraphView(graph), output, *given_inputs, nodes, integers_below=128, narrowed=bool(casts))


class _NotAlike(Exception):
    """Rows are taken out by their number along the axis that is made smaller."""


def _taken(node: Node) -> Iterator[tuple[Node, int]]:
    """Along which axes of which tensor the node takes rows out by their number."""
    name, source = op_name(node), node.args[0] if node.args else None
    if not isinstance(source, Node) or tensor(source) is None:
        return
    if name in _ALONG:
        yield source, argument(node, "dim")
    elif name == "index":
        yield from ((source, d) for d, index in enumerate(argument(node, "indices")) if index is not None)


def _same(a: Any, b: Any) -> bool:
    """Are the sizes the same number, or the same symbol? No question is asked of a symbol."""
    return a == b if type(a) is type(b) is int else size_text(a) == size_text(b)


def _fewer(sizes: list[Any], size: int, rows: int) -> list[Any]:
    """The first of the sizes that is `size` becomes `rows`."""
    at = next((i for i, s in enumerate(sizes) if s == size and isinstance(s, int)), None)
    return [rows if i == at else s for i, s in enumerate(sizes)]


def _resized(arg: Any, size: int, rows: int) -> Any:
    """Lists of sizes with the smaller one."""
    if isinstance(arg, (list, tuple)):
        if size and arg and all(isinstance(a, int) and not isinstance(a, bool) for a in arg):
            return type(arg)(_fewer(list(arg), size, rows))
        return type(arg)(_resized(a, size, rows) for a in arg)
    if isinstance(arg, dict):
        return {k: _resized(v, size, rows) for k, v in arg.items()}
    return arg


def _on_cpu(arg: Any) -> Any:
    if isinstance(arg, torch.device):
        return torch.device("cpu")
    if isinstance(arg, (list, tuple)):
        return type(arg)(_on_cpu(a) for a in arg)
    if isinstance(arg, dict):
        return {k: _on_cpu(v) for k, v in arg.items()}
    return arg
