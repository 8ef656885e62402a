"""The two products of attention, Q·Kᵀ and weights·V, whichever operator writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxfuse.graph.view import argument, fake, op_name, static, tensor

Canonical = Callable[[torch.Tensor], torch.Tensor]


def _same(t: torch.Tensor) -> torch.Tensor:
    return t


def _swap(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(-1, -2)


@dataclass(frozen=True)
class Product:
    """A batched matrix product seen as ``[*lead, M, K] · [*lead, N, K]ᵀ = [*lead, M, N]``, lead dims broadcast."""

    node: Node
    left: Node
    right: Node
    rows: Canonical
    """Brings the left operand to ``[*lead, M, K]``."""
    columns: Canonical
    """Brings the right operand to ``[*lead, N, K]``."""
    result: Canonical
    """Brings the result to ``[*lead, M, N]``."""
    added: Node | None = None
    """`baddbmm` adds ``beta ·`` this to ``alpha ·`` the product."""
    alpha: float = 1.0
    beta: float = 1.0


def product(node: Node) -> Product | None:
    """This node as a product whose columns come from its right operand; None if it is no product."""
    return next(iter(products(node)), None)


def products(node: Node) -> tuple[Product, ...]:
    """The ways to see this node as a product: in an einsum any axis of an operand's own may be the rows or columns."""
    if op_name(node) == "einsum" and isinstance(node.args[1], (list, tuple)) and len(node.args[1]) == 2:
        left, right = node.args[1]
        if isinstance(left, Node) and isinstance(right, Node):
            return tuple(_einsum(node, str(node.args[0]), left, right))
    found = _product(node)
    return () if found is None else (found,)


def _product(node: Node) -> Product | None:
    name = op_name(node)
    if name in ("matmul", "bmm", "baddbmm", "mm"):
        operands: list[Any] = [a for a in node.args if isinstance(a, Node)]
        added = operands.pop(0) if name == "baddbmm" and len(operands) == 3 else None
        if len(operands) != 2 or any(fake(o).dim() < 2 for o in operands):
            return None
        scale = {k: float(argument(node, k)) for k in ("alpha", "beta")} if added is not None else {}
        return Product(node, operands[0], operands[1], _same, _swap, _same, added, **scale)
    if name == "sum":
        return _sum(node)
    return None


def _sum(node: Node) -> Product | None:
    """sum(a · b) over one axis, where a has size 1 for the columns and b for the rows."""
    multiplied, axes = node.args[0], argument(node, "dim")
    if not isinstance(multiplied, Node) or op_name(multiplied) != "mul" or argument(node, "keepdim"):
        return None
    factors = [a for a in multiplied.args if isinstance(a, Node) and tensor(a) is not None]
    rank = fake(multiplied).dim()
    if len(factors) != 2 or rank < 4 or not isinstance(axes, (list, tuple)) or len(axes) != 1:
        return None
    axis = axes[0] % rank - rank
    if axis not in (-1, -2) or any(fake(f).dim() != rank for f in factors):
        return None
    spread = -2 if axis == -1 else -1  # the axis along which the result has its columns
    for left, right in (factors, factors[::-1]):
        if static(fake(left).shape[spread]) == 1 and static(fake(right).shape[-3]) == 1:
            columns = (lambda t: t.squeeze(-3)) if axis == -1 else (lambda t: t.squeeze(-3).transpose(-1, -2))
            return Product(node, left, right, lambda t: t.squeeze(spread), columns, _same)
    return None


def _einsum(node: Node, equation: str, left: Node, right: Node) -> Iterator[Product]:
    """An einsum as products: M is a letter that only the left operand has, N one that only the right has, all other
    letters of the result are lead axes. Readings whose M and N stand last in the result come first."""
    inputs, _, out = equation.replace(" ", "").partition("->")
    a, _, b = inputs.partition(",")
    if "..." in a and "..." in b and "..." in out and fake(left).dim() - len(a) == fake(right).dim() - len(b):
        spare = "ZYXWVU"[: fake(left).dim() - len(a) + 3]
        a, b, out = (t.replace("...", spare) for t in (a, b, out))
    if not out or "." in a + b + out or any(len(set(t)) < len(t) for t in (a, b, out)):
        return
    summed = [c for c in a if c in b and c not in out]
    rows = [c for c in out if c in a and c not in b]
    columns = [c for c in out if c in b and c not in a]
    if len(summed) != 1 or not rows or not columns or len(a) < 3 or len(b) < 3:
        return
    if (set(a) | set(b)) - {*out, *summed}:
        return
    for m in reversed(rows):
        for n in reversed(columns):
            yield _with_axes(node, (left, a), (right, b), out, (m, n, summed[0]))


def _with_axes(
    node: Node, left: tuple[Node, str], right: tuple[Node, str], out: str, axes: tuple[str, str, str]
) -> Product:
    """The product of these operands, written in letters, with rows, columns and what is summed over."""
    m, n, k = axes
    lead = [c for c in out if c not in (m, n)]

    def order(letters: str, last: tuple[str, str]) -> Canonical:
        wanted = [*lead, *last]
        present = [letters.index(c) for c in wanted if c in letters]
        missing = [i for i, c in enumerate(wanted) if c not in letters]

        def canonical(t: torch.Tensor) -> torch.Tensor:
            t = t.permute(present)
            for position in missing:
                t = t.unsqueeze(position)
            return t

        return canonical

    (a_node, a), (b_node, b) = left, right
    return Product(node, a_node, b_node, order(a, (m, k)), order(b, (n, k)), order(out, (m, n)))


def swapped(found: Product) -> Product:
    """The same product read the other way round: ``(A·Bᵀ)ᵀ = B·Aᵀ``."""
    return Product(
        found.node,
        found.right,
        found.left,
        found.columns,
        found.rows,
        lambda t: found.result(t).transpose(-1, -2),
        found.added,
        found.alpha,
        found.beta,
    )
