"""A region around one flex_attention, and what it is."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from fxfuse.graph.region import Region
from fxfuse.graph.view import GraphView, fake, op_name, static, tensor
from fxfuse.patterns.flex_attention.calls import OUTPUTS, Flex, flex
from fxfuse.patterns.flex_attention.counting import counted
from fxfuse.patterns.flex_attention.encoding import encode
from fxfuse.patterns.flex_attention.expression import INDICES, Expr, Unreadable, captured, expression, leaf
from fxfuse.patterns.flex_attention.forms import Problem, attention_form, decomposed_form
from fxfuse.patterns.flex_attention.options import FlexCalls, Windows
from fxfuse.patterns.flex_attention.preview import is_constant, preview_form
from fxfuse.patterns.flex_attention.score import WORKING, Opaque, conjuncts, read_score
from fxfuse.recognise.answers import Found, Reason
from fxfuse.recognise.probe import Probe

ULP = 8.0
_SCORES = 1 << 20
"""More are not computed to ask what a mod means."""
_PARTIAL = frozenset(
    ["log", "log2", "log10", "log1p", "sqrt", "rsqrt", "pow", "asin", "acos", "acosh", "atanh", "logit"]
)
"""Not defined for every number: of captured tensors they are asked with the values that these have."""
_LONGEST = 160
"""Numbers up to here are met by sequences that are longer."""


def region_of(view: GraphView, call: Flex, taken: Node) -> Region:
    """The call and what takes one output from it; captured tensors are inputs, block lists are not read."""
    buffers = [b for b in (*call.score_buffers, *call.mask_buffers) if isinstance(b, Node) and tensor(b) is not None]
    sources = [call.query, call.key, call.value]
    others = [n for n in dict.fromkeys(view.canonical(b) for b in buffers) if n not in sources]
    query, key, value = (fake(n).shape for n in sources)
    rows = _rows(call)
    sizes = [(key[0], query[0]), (value[0], query[0]), (value[2], key[2])]
    equal_sizes = tuple(_roots([*sizes, *_indexed(call)]))
    return Region(
        view,
        taken,
        tuple(sources),
        tuple(others),
        (call.node, taken),
        equal_sizes=equal_sizes,
        source_limits=_limits(query[1]),
        integers_below=rows,
        hidden_table_rows=rows,
        telling_sizes=tuple(_telling(call, (query[2], key[2]), query[0])),
        ascending=frozenset(view.canonical(n) for n in _searched(call)),
    )


def _searched(call: Flex) -> Iterator[Node]:
    """Captured tensors that a mod searches: their rows ascend."""
    for mod, first, buffers in ((call.score_mod, 5, call.score_buffers), (call.mask_mod, 4, call.mask_buffers)):
        given = [n for n in mod.graph.nodes if n.op == "placeholder"][first:]
        held = dict(zip(given, buffers, strict=False))
        for node in mod.graph.nodes:
            if op_name(node) in ("searchsorted", "bucketize"):
                for operand in node.all_input_nodes:
                    if isinstance(row := held.get(operand), Node):
                        yield row


def _limits(heads: Any) -> tuple[int, ...]:
    """Batch, heads, length and head size that are enough, where static ones are more."""
    count = static(heads)
    if count is None:
        return ()
    whole = sys.maxsize
    return 4, whole, max(16, int((_SCORES / (4 * count)) ** 0.5)), whole


def _indexed(call: Flex) -> Iterator[tuple[Any, Any]]:
    """Sizes that are equal because tables are indexed with b, h, q or kv themselves."""
    query, key = fake(call.query).shape, fake(call.key).shape
    lengths = dict(zip(INDICES, (query[0], query[1], query[2], key[2]), strict=True))
    try:
        score, mask = expressions(call, count=False)
    except Unreadable:
        return
    for expr in (e for root in (score, mask) for e in root.walk()):
        if expr.name == "index" and expr.args[0].target is None:
            for size, index in zip(expr.args[0].shape, expr.args[1], strict=False):
                if isinstance(index, Expr) and index.leaf in lengths:
                    yield size, lengths[index.leaf]


def _rows(call: Flex) -> int:
    """The fewest rows of any table that captured integers index."""
    rows = [4]
    try:
        exprs = [e for root in expressions(call, count=False) for e in root.walk() if e.name == "index"]
    except Unreadable:
        return 4
    for expr in exprs:
        table, indices = expr.args
        sizes = zip(table.shape if table.free else (), indices, strict=False)
        rows += [n for n, i in sizes if isinstance(n, int) and isinstance(i, Expr) and i.leaf not in INDICES]
    return max(1, min(rows))


def _roots(pairs: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """The same equalities without a cycle: each size takes the value of one that came before it."""
    parent: dict[str, Any] = {}

    def root(size: Any) -> Any:
        while str(size) in parent:
            size = parent[str(size)]
        return size

    for a, b in pairs:
        first, second = root(b), root(a)
        if str(first) != str(second) and isinstance(first, torch.SymInt) and isinstance(second, torch.SymInt):
            parent[str(second)] = first
            yield second, first


def _telling(call: Flex, lengths: Sequence[Any], batch: Any) -> Iterator[tuple[Any, int]]:
    """Lengths that exceed every number in the mods, if they are not too long to compute with."""
    try:
        numbers = [n for root in expressions(call, count=False) for expr in root.walk() for n in _integers(expr)]
    except Unreadable:
        return
    largest = max([0, *(n for n in numbers if n <= _LONGEST)])
    for i, size in enumerate((batch, *lengths)):
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
            yield size.node.expr, 2 if i == 0 else largest + 3 + i


def _integers(expr: Expr) -> Iterator[int]:
    numbers = [expr.number] if expr.leaf == "constant" else expr.args
    yield from (abs(n) for n in numbers if isinstance(n, int) and not isinstance(n, bool))


def read(region: Region, ask: Probe, calls: FlexCalls = "standard", windows: Windows = "mask") -> Found | Reason:
    """One Attention where the mods allow it, and else the primitives, or the operator that is asked for."""
    problem, plain = problem_of(region, ask), problem_of(region, ask, count=False)
    if isinstance(problem, Reason):
        return problem
    if isinstance(plain, Reason):
        return plain
    position: Any = region.output.args[1]
    output = OUTPUTS[position]
    if output != "output":
        why = f"{output} is no output of Attention: it is computed beside it"
        return _decomposed(plain, output, why)
    score = read_score(problem.score)
    encoding = score if isinstance(score, Opaque) else encode(score, problem.mask, problem.call.scale, windows)
    if isinstance(encoding, Opaque):
        return _kept(plain, calls, encoding.reason)
    if calls == "preview_only":
        return _kept(plain, calls, "FlexAttention alone is asked for")
    return Found(
        "Attention",
        encoding.parts,
        (attention_form(problem, encoding),),
        ulp=ULP,
        averaging=True,
        otherwise=_kept(plain, calls, "it could not be proven"),
        from_leaves=problem.from_leaves,
        read=True,
    )


def problem_of(region: Region, ask: Probe, *, count: bool = True) -> Problem | Reason:
    """The call in a region, its mods as expressions; see `expressions`."""
    call = next(found for n in region.nodes if (found := flex(n)) is not None)
    try:
        mod, mask = expressions(call, count=count)
    except Unreadable as error:
        return Reason(f"flex_attention with a mod that cannot be read: {error}", 3)
    buffers = (*call.score_buffers, *call.mask_buffers)
    counts = count and any(counted(b) is not None for b in buffers)
    # Of other tensors in their places, which may count or not, nothing is said.
    ask.read_leaves = ask.read_leaves or bool(buffers)
    partial = any(e.name in _PARTIAL and e.leaves - {"score", *INDICES} for root in (mod, mask) for e in root.walk())
    return Problem(call, region, mod, conjuncts(mask), counts or partial)


def _kept(problem: Problem, calls: FlexCalls, why: str) -> Found:
    """What is no Attention, and why: FlexAttention where that is asked for, or primitives."""
    decomposed = _decomposed(problem, "output", why)
    if calls == "standard" or is_constant(problem):
        return decomposed
    parameters = {"scale": problem.call.scale, "no Attention": why}
    return Found(
        "FlexAttention",
        parameters,
        (preview_form(problem),),
        ulp=ULP,
        averaging=True,
        otherwise=decomposed,
        from_leaves=problem.from_leaves,
        read=True,
    )


def _decomposed(problem: Problem, output: str, why: str) -> Found:
    form = decomposed_form(problem, output)
    return Found(
        "Attention", {}, (form,), ulp=ULP, averaging=True, decomposed=why, from_leaves=problem.from_leaves, read=True
    )


def expressions(call: Flex, *, count: bool = True) -> tuple[Expr, Expr]:
    """The score and the mask function; `count`: of tensors that only count, what they count and not where it is read.

    Raises:
        Unreadable: one of them uses what has no meaning on grids.
    """
    indices = [leaf(name, torch.int64) for name in INDICES]
    score = leaf("score", WORKING)
    return (
        expression(call.score_mod, [score, *indices, *captured("score", call.score_buffers, count=count)]),
        expression(call.mask_mod, [*indices, *captured("mask", call.mask_buffers, count=count)]),
    )
