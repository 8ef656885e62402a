"""A spelling-free view of an export graph: what kind of operator a node is, its shape, its order, its equals.

The vocabulary below is what proposing regions walks through. It decides where to look, never what a region means.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch.fx import Graph, Node

from fxfuse.graph.blocks.wrapped import Wrapped, block
from fxfuse.graph.higher_order import higher_order
from fxfuse.torch_seams import schema_of

LAYOUT = frozenset(
    [
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "_unsafe_view",
        "view_as",
        "reshape_as",
        "transpose",
        "swapaxes",
        "swapdims",
        "permute",
        "t",
        "mT",
        "adjoint",
        "movedim",
        "moveaxis",
        "unsqueeze",
        "squeeze",
        "expand",
        "expand_as",
        "broadcast_to",
        "clone",
        "contiguous",
        "alias",
        "detach",
        "lift_fresh_copy",
        "select",
        "slice",
        "narrow",
        "split",
        "split_with_sizes",
        "chunk",
        "tensor_split",
        "unbind",
        "unsafe_split",
        "unsafe_chunk",
        "cat",
        "concat",
        "concatenate",
        "stack",
        "hstack",
        "repeat",
        "repeat_interleave",
        "tile",
        "index_select",
        "index",
        "take_along_dim",
        "gather",
        "flip",
        "roll",
        "view_as_complex",
        "view_as_real",
        "real",
        "imag",
        "getitem",
        "numpy_T",
        "T",
        "copy",
        "slice_scatter",
        "select_scatter",
        "diagonal_scatter",
    ]
)
"""Operators that only move elements."""
SCATTERS = frozenset(["slice_scatter", "select_scatter", "diagonal_scatter"])
"""A tensor but for a part of it, which is another: what is written in place, read as what it computes."""
UNSET = frozenset(["empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"])
"""Tensors that hold nothing until they are written to."""
BLANK = UNSET | frozenset(["zeros", "zeros_like", "new_zeros"])
"""What is made to be written to: it depends on nothing, and belongs to the region that writes to it."""
CAST = frozenset(["to", "_to_copy", "type_as", "float", "half", "bfloat16", "double"])
NO_OP = frozenset(["dropout", "feature_dropout", "native_dropout", "alpha_dropout", "identity"])
"""Random in training, the identity in evaluation: allowed only as the identity."""
ALIASES = frozenset(["getitem", "reshape", "flatten", "contiguous", "to", "type_as"]) | NO_OP
"""What may be a view though its schema does not say so."""
ARITHMETIC = frozenset(
    [
        "mul",
        "add",
        "sub",
        "rsub",
        "neg",
        "negative",
        "div",
        "true_divide",
        "addcmul",
        "complex",
        "polar",
        "conj",
        "_conj",
    ]
)
ROOTS = frozenset(
    [
        "pow",
        "square",
        "abs",
        "rsqrt",
        "sqrt",
        "reciprocal",
        "mean",
        "sum",
        "rms_norm",
        "linalg_vector_norm",
        "norm",
        "einsum",
        "linalg_vecdot",
        "matmul",
        "bmm",
        "clamp",
        "clamp_min",
        "maximum",
        "ones_like",
        "full_like",
    ]
)
"""What a norm may be written with beside arithmetic; a clamp is none, which is to be said."""
CONTRACTION = frozenset(["matmul", "bmm", "mm", "einsum", "baddbmm", "linear"])
ASSERTIONS = frozenset(["_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size"])
DETACHED = "fxfuse_detached"
"""Of a node that detaches what was computed under `no_grad`: no region goes across it, for none has gradients there."""

LOWERED = "fxfuse_lowered"
"""Of a node that autocast computes in a lower type than the model is in: that type."""


def op_name(node: Node) -> str:
    """``"mul"`` for `aten.mul.Tensor`, ``"getitem"`` for `operator.getitem`, ``""`` for what is not a call."""
    if node.op != "call_function":
        return ""
    target = node.target
    known = _names.get(id(target))
    if known is None:
        if target is operator.getitem:
            name = "getitem"
        else:
            schema = schema_of(target)
            name = str(schema.name.split("::")[1]) if schema is not None else str(target)
        known = _names[id(target)] = (target, name)  # kept, so that no other target gets its id
    return known[1]


_names: dict[int, tuple[Any, str]] = {}
"""Of every target that was met. By identity: to hash an operator costs as much as to read its name."""


def tensor(node: Node) -> torch.Tensor | None:
    """The node's fake tensor, or None for sizes, lists and assertions."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def fake(node: Node) -> torch.Tensor:
    """The node's fake tensor, for nodes known to have one."""
    value = tensor(node)
    assert value is not None, f"{node.name} is not a tensor"
    return value


def is_size(node: Node) -> bool:
    """Is it a number, and no tensor?"""
    return isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def is_float(node: Node) -> bool:
    value = tensor(node)
    return value is not None and value.dtype.is_floating_point


def size_text(size: Any) -> str:
    """A size as text; printing a symbolic expression is slow, and the same few are printed over and over."""
    return _text(size.node.expr) if isinstance(size, torch.SymInt) else str(size)


@lru_cache(maxsize=4096)
def _text(expr: Any) -> str:
    return str(expr)


def static(dim: Any) -> int | None:
    """The size if it is a plain int (never guards on a symbol)."""
    return dim if isinstance(dim, int) else None


def is_pure(node: Node) -> bool:
    """Computes a value from its inputs and does nothing else."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem or higher_order(node) is not None:
        return True
    schema = schema_of(node.target)
    if schema is None or schema.is_mutable:
        return False
    return not is_random(node)


def is_random(node: Node) -> bool:
    """Draws random numbers: active dropout and its like."""
    tags = getattr(node.target, "tags", ())
    name = op_name(node)
    if name in NO_OP:
        p, train = [*node.args, True, True][1:3]
        return bool(train) and not (isinstance(p, (int, float)) and p == 0)
    if name == "scaled_dot_product_attention":
        p = argument(node, "dropout_p")
        return not (isinstance(p, (int, float)) and p == 0)
    return torch.Tag.nondeterministic_seeded in tags


def argument(node: Node, name: str) -> Any:
    """The value of a schema argument, given by position, by keyword or by default."""
    for position, arg in enumerate(schema_of(node.target).arguments):
        if arg.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            if not arg.kwarg_only and position < len(node.args):
                return node.args[position]
            return arg.default_value if arg.has_default_value() else None
    return None


class GraphView:
    """Order, shapes and equal values of one graph. It is a snapshot: build a new one after editing."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = list(graph.nodes)
        self.order = {node: position for position, node in enumerate(self.nodes)}
        self._shapes: dict[Node, tuple[str, ...]] = {}
        self.mutations = [(self.order[n], storages) for n in self.nodes if (storages := mutated(n))]
        self._first = self._number()

    def shape(self, node: Node) -> tuple[str, ...]:
        """The symbolic shape as text: equal text, equal sizes; nothing is guarded on."""
        found = self._shapes.get(node)
        if found is None:
            value = tensor(node)
            found = () if value is None else tuple(map(size_text, value.shape))
            self._shapes[node] = found
        return found

    def same_shape(self, a: Node, b: Node) -> bool:
        return self.shape(a) == self.shape(b) and tensor(a) is not None

    def canonical(self, node: Node) -> Node:
        """The first node of the graph that computes the same value in the same way."""
        return self._first.get(node, node)

    def sorted(self, nodes: Iterable[Node]) -> list[Node]:
        return sorted(nodes, key=self.order.__getitem__)

    def mutated_between(self, nodes: Iterable[Node], start: int, stop: int) -> bool:
        """Is the storage of one of these nodes written in place between two positions?"""
        writes = [storages for position, storages in self.mutations if start < position < stop]
        if not writes:
            return False
        mine = {root for node in nodes for root in storage_roots(node)}
        return any(mine & storages for storages in writes)

    def _number(self) -> dict[Node, Node]:
        """Value numbering of pure nodes; whatever an in-place write may touch equals only itself."""
        written = {root for _, storages in self.mutations for root in storages}
        first: dict[Any, Node] = {}
        result: dict[Node, Node] = {}

        def number(arg: Any) -> Any:
            if isinstance(arg, Node):
                return ("node", result.get(arg, arg))
            if isinstance(arg, (list, tuple)):
                return tuple(number(a) for a in arg)
            return (type(arg).__name__, repr(arg)) if not isinstance(arg, slice) else repr(arg)

        for node in self.nodes:
            result[node] = node
            if not is_pure(node) or touches(node, written):
                continue
            key = (node.target, number(node.args), tuple((k, number(v)) for k, v in sorted(node.kwargs.items())))
            result[node] = first.setdefault(key, node)
        return result


def storage_roots(node: Node) -> set[Node]:
    """The nodes whose storage this node may share: itself, and back through everything that may be a view.

    A view's first argument is what it is a view of.
    """
    roots: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in roots:
            continue
        roots.add(current)
        stack.extend(bases(current))
    return roots


def touches(node: Node, written: set[Node]) -> bool:
    """Does it read one of these storages, or may its value be in one?"""
    return bool(written) and any(storage_roots(n) & written for n in (node, *node.all_input_nodes))


def bases(node: Node) -> list[Node]:
    """The nodes whose storage its value may be a view of, or that it may be itself."""
    if (inside := block(node)) is not None:
        return [o for o in inside.operands if isinstance(o, Node)]
    if node.op == "call_function" and isinstance(out := node.kwargs.get("out"), Node):
        return [out]
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return []
    schema = schema_of(node.target)
    aliases = schema is not None and any(r.alias_info is not None for r in schema.returns)
    return [node.args[0]] if aliases or op_name(node) in ALIASES else []


def mutated(node: Node) -> set[Node]:
    """The storages that this node writes to in place."""
    if (inside := block(node)) is not None:
        return _mutated_inside(inside)
    schema = schema_of(node.target) if node.op == "call_function" else None
    if schema is None or not schema.is_mutable:
        return set()
    found: set[Node] = set()
    for position, arg in enumerate(schema.arguments):
        if arg.alias_info is not None and arg.alias_info.is_write:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(arg.name)
            for target in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(target, Node):
                    found |= storage_roots(target)
    return found


def _mutated_inside(inside: Wrapped) -> set[Node]:
    """Of a subgraph, the storages of operands that it writes to."""
    given = [n for n in inside.nodes if n.op == "placeholder"]
    written = {root for n in inside.nodes for root in mutated(n)}
    operands = [o for n, o in zip(given, inside.operands, strict=True) if n in written and isinstance(o, Node)]
    return {root for operand in operands for root in storage_roots(operand)}
