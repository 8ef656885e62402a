"""Sizes that have to be multiples of a number: a program that views its length as windows of 6 runs at multiples of 6
only, and is evaluated at such sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from sympy import Poly, Symbol, div, sympify
from torch.fx import Node

from fxfuse.graph.view import fake, op_name, size_text, tensor
from fxfuse.torch_seams import FloorDiv

_VIEWS = frozenset(["view", "reshape", "unflatten", "_unsafe_view"])


def multiples_of(nodes: Iterable[Node]) -> dict[Any, int]:
    """Of each symbol that a view divides, the number that it must be a multiple of: elsewhere the view does not fit."""
    found: dict[Any, int] = {}
    for node in nodes:
        value = tensor(node) if op_name(node) in _VIEWS else None
        if value is None or not any("//" in size_text(d) for d in value.shape):
            continue
        wanted = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (list, tuple)) else ()
        sizes = [n.meta["val"] if isinstance(n, Node) else n for n in wanted]
        if not isinstance(node.args[0], Node) or tensor(node.args[0]) is None:
            continue
        before = _count(fake(node.args[0]).shape)
        after = _count(sizes if sizes and -1 not in [s for s in sizes if isinstance(s, int)] else value.shape)
        for division in sympify(after).atoms(FloorDiv):
            symbol, by = division.args
            if symbol.is_Symbol and by.is_Integer and int(by) > 1 and not _fits(before, after, symbol, int(by)):
                found[symbol] = math.lcm(found.get(symbol, 1), int(by))
    return found


def divided(expr: Any, multiples: Mapping[Any, int]) -> Any:
    """The expression in which what has to be a multiple is one: ``6·u // 6`` is u."""
    units = {s: by * Symbol(f"{s}_units", positive=True, integer=True) for s, by in multiples.items()}
    return expr.xreplace(units) if units and expr.free_symbols & set(units) else expr


def exact_quotient(number: Any, by: Any) -> Any:
    """``S² // S`` is S: the quotient of two polynomials of sizes that leaves nothing over; else None.

    Where torch is told that a size may be 0 it leaves the division as it is. fxfuse may simplify it: with a size of 0
    there is no element to compute.
    """
    if by.is_Integer or not (number.is_polynomial() and by.is_polynomial()):
        return None
    quotient, rest = div(number, by, *sorted(number.free_symbols | by.free_symbols, key=str), domain="QQ")
    whole = quotient.is_Integer or (quotient.free_symbols and all(c.is_Integer for c in Poly(quotient).coeffs()))
    return quotient if rest == 0 and whole else None


def _count(sizes: Iterable[Any]) -> Any:
    """How many elements that is, as an expression."""
    return math.prod(d.node.expr if isinstance(d, torch.SymInt) else d for d in sizes)


def _fits(before: Any, after: Any, symbol: Any, by: int) -> bool:
    """Does the view fit where the symbol is no multiple?"""
    values = dict.fromkeys(sympify(before * after).free_symbols, 2 * by) | {symbol: 2 * by + 1}
    try:
        return bool(sympify(before).xreplace(values) == sympify(after).xreplace(values))
    except ZeroDivisionError:
        return False
