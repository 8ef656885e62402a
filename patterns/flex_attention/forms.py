"""What takes the place of a flex_attention: one Attention, or the primitives that it is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfuse.graph.region import Region
from fxfuse.graph.view import fake, tensor
from fxfuse.patterns.attention.bias import with_sinks
from fxfuse.patterns.flex_attention.calls import Flex
from fxfuse.patterns.flex_attention.encoding import Encoding
from fxfuse.patterns.flex_attention.expression import INDICES, Expr, Unreadable
from fxfuse.patterns.flex_attention.grid import Grid
from fxfuse.patterns.flex_attention.score import Factor
from fxfuse.recognise.answers import Form


@dataclass(frozen=True)
class Problem:
    """One call, read: its mods as expressions, and where their captured values are found."""

    call: Flex
    region: Region
    score: Expr
    mask: tuple[Expr, ...]
    """All of these hold where a key is kept."""
    from_leaves: bool = False
    """Does it hold, or is it defined, for the values only that captured tensors have in this program?"""

    @property
    def in_memory_BSHD(self) -> bool:
        """Does the original's output lie as Attention's does?"""
        (_, heads, _, size), strides = fake(self.region.output).shape, fake(self.region.output).stride()
        return str(strides[1]) == str(size) and str(strides[2]) == str(heads * size)

    def grid(
        self,
        inputs: Sequence[Tensor],
        lengths: Sequence[int],
        score: Tensor | None = None,
        positions: Sequence[Tensor] | None = None,
    ) -> Grid:
        """Values for these inputs of the region; `lengths` are B, H, S and T, `positions` grids of that many."""
        q = inputs[0]
        if positions is None:
            shapes = [[-1 if axis == d else 1 for d in range(4)] for axis in range(4)]
            positions = [torch.arange(n, device=q.device).view(s) for n, s in zip(lengths, shapes, strict=True)]
        env: dict[str, Any] = {"score": score, **dict(zip(INDICES, positions, strict=True))}
        for kind, values in (("score", self.call.score_buffers), ("mask", self.call.mask_buffers)):
            for i, value in enumerate(values):
                env[f"{kind} {i}"] = self._captured(value, inputs)
        return Grid(env, exact=q.dtype == torch.float64)

    def _captured(self, value: Any, inputs: Sequence[Tensor]) -> Any:
        if isinstance(value, Node):
            if tensor(value) is not None:
                return inputs[self.region.inputs.index(self.region.view.canonical(value))]
            value = value.meta["val"]
        return _size(value.node.expr, self._symbols(inputs)) if isinstance(value, torch.SymInt) else value

    def _symbols(self, inputs: Sequence[Tensor]) -> dict[Any, Any]:
        """What each symbol of the program is, as a size of an input."""
        found: dict[Any, Any] = {}
        for node, given in zip(self.region.inputs, inputs, strict=True):
            for symbolic, size in zip(fake(node).shape, given.shape, strict=True):
                any_size: Any = symbolic
                if isinstance(any_size, torch.SymInt):
                    found.setdefault(any_size.node.expr, size)
        return found


Column = Callable[[tuple[Tensor, ...]], Tensor]
"""Of the inputs of a region: [1 or B, 1 or Hq, 1 or S, 1]."""


def attention_form(problem: Problem, encoding: Encoding, sinks: Column | None = None) -> Form:
    """One `fxfuse::attention` on q [B, Hq, S, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv].

    Sinks are one more column of the mask, on a key and a value of zeros.
    """
    out = fake(problem.region.output).dtype
    attributes: dict[str, Any] = {"is_causal": 1} if encoding.causal else {}
    if not math.isclose(encoding.scale, float(fake(problem.call.query).shape[3]) ** -0.5, rel_tol=1e-9):
        attributes["scale"] = encoding.scale
    if encoding.softcap:
        attributes["softcap"] = encoding.softcap
    windows = zip(("left_window_size", "right_window_size"), encoding.window, strict=True)
    attributes |= {name: size for name, size in windows if size >= 0}
    repeats = any("h" in f.value.leaves for f in encoding.on_key)

    def attention(*inputs: Tensor) -> Tensor:
        q, k, v = inputs[:3]
        lengths = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        grid = problem.grid(inputs, lengths)
        kind = torch.promote_types(q.dtype, torch.float32) if encoding.wide else q.dtype
        column = None if sinks is None else sinks(inputs)
        kind = kind if column is None else torch.promote_types(kind, column.dtype)
        q, k, v = (cast(t, kind) for t in (q, k, v))
        k, v = batched(k, q), batched(v, q)
        if repeats:
            k, v = _each_head(k, lengths[1]), _each_head(v, lengths[1])
        if encoding.number != 1:
            q = q * encoding.number
        for factor in encoding.on_query:
            q = _times(q, grid(factor.value), factor)
        for factor in encoding.on_key:
            k = _times(k, grid(factor.value).transpose(2, 3), factor)
        mask = _mask(encoding, grid, lengths, kind)
        if column is not None:
            column = column.to(kind).expand(-1, lengths[1], -1, -1)
            mask = with_sinks(mask, column, (lengths[2], lengths[3]))
            k, v = (torch.nn.functional.pad(t, (0, 0, 0, 1)) for t in (k, v))
        y: Tensor = torch.ops.fxfuse.attention(q, k, v, mask, **attributes)
        y = y if problem.in_memory_BSHD else laid_out(y)
        return y if q.dtype == torch.float64 else cast(y, out)

    return attention


def decomposed_form(problem: Problem, output: str) -> Form:
    """An output of flex_attention as eager PyTorch computes it, in ATen: right for every mod."""

    def attention(*inputs: Tensor) -> Tensor:
        q, k = inputs[:2]
        working = torch.promote_types(q.dtype, torch.float32)
        lengths = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        k = _each_head(_exactly(k, q, k), lengths[1])
        raw = (laid_out(cast(q, working)) @ laid_out(cast(k, working).transpose(2, 3))) * problem.call.scale
        grid = problem.grid(inputs, lengths, raw)
        scores: Tensor = grid(problem.score)
        kept = conjunction(problem.mask, grid)
        if kept is not None:
            scores = torch.where(kept, scores, -math.inf)
        scores = cast(scores, working).expand(lengths)
        if output == "logsumexp":
            return torch.logsumexp(scores, -1) * (1 / math.log(2))
        if output == "max_scores":
            return scores.amax(-1) * (1 / math.log(2))
        v = cast(_each_head(_exactly(inputs[2], q, k), lengths[1]), q.dtype)
        nothing = (scores == -math.inf).all(-1, keepdim=True)
        y = cast(torch.softmax(scores, -1).masked_fill(nothing, 0.0), q.dtype) @ laid_out(v)
        return laid_out(y.transpose(1, 2)).transpose(1, 2) if problem.in_memory_BSHD else y

    return attention


def _mask(encoding: Encoding, grid: Grid, lengths: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """Boolean or to be added, the last two dims whole: not every runtime broadcasts them."""
    mask = conjunction(encoding.keep, grid)
    if encoding.bias is not None:
        bias = grid(encoding.bias)
        if not isinstance(bias, Tensor):
            raise Unreadable("the bias is a size")
        bias = cast(bias, dtype)
        mask = bias if mask is None else torch.where(mask, bias, -math.inf)
    return None if mask is None else mask.expand(mask.shape[0], mask.shape[1], lengths[2], lengths[3])


def conjunction(conditions: Sequence[Expr], grid: Grid) -> Tensor | None:
    result: Tensor | None = None
    for condition in conditions:
        value = grid(condition)
        result = value if result is None else torch.logical_and(result, value)
    return result


def _times(t: Tensor, by: Any, factor: Factor) -> Tensor:
    by = cast(by, t.dtype) if isinstance(by, Tensor) else by
    result: Tensor = t / by if factor.inverse else t * by
    return result


def batched(t: Tensor, q: Tensor) -> Tensor:
    """Keys of batch 1 serve every query; other batches can only be equal."""
    alike = type(t.shape[0]) is not int or str(t.shape[0]) == str(q.shape[0])
    return t if alike else t.expand(q.shape[0], t.shape[1], t.shape[2], t.shape[3])


def _exactly(t: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """t [B or 1, Hkv, T, D] with the batch of q and the length of k, whose symbols may be others: by picking, which
    asks for no size to equal another."""
    if str(t.shape[0]) != str(q.shape[0]):
        last = torch.arange(t.shape[0], device=t.device)[-1:]
        t = t.index_select(0, torch.minimum(torch.arange(q.shape[0], device=t.device), last))
    if str(t.shape[2]) != str(k.shape[2]):
        t = t.index_select(2, torch.arange(k.shape[2], device=t.device))
    return t


def laid_out(t: Tensor) -> Tensor:
    """Contiguous. Where sizes are symbols a copy: whether it is already may hang on a size being 1, and to ask that
    would be a guard; so would a product of what is not."""
    symbolic = any(isinstance(size, torch.SymInt) for size in t.shape)
    return t.clone(memory_format=torch.contiguous_format) if symbolic else t.contiguous()


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


def _each_head(t: Tensor, heads: int) -> Tensor:
    """[B, Hkv, T, D] as [B, Hq, T, D]."""
    groups = heads // t.shape[1]
    if groups == 1:
        return t
    B, Hkv, T, D = t.shape
    return laid_out(t.unsqueeze(2).expand(B, Hkv, groups, T, D)).reshape(B, heads, T, D)


def _size(expr: Any, symbols: dict[Any, Any]) -> Any:
    """A symbolic size, from the sizes of the inputs."""
    if expr in symbols:
        return symbols[expr]
    if expr.is_Integer:
        return int(expr)
    name, args = type(expr).__name__, [_size(a, symbols) for a in expr.args]
    if name in ("Add", "Mul") and args:
        return sum(args) if name == "Add" else math.prod(args)
    if name in ("FloorDiv", "CleanDiv") and len(args) == 2:
        return args[0] // args[1]
    if name in ("Mod", "PythonMod") and len(args) == 2:
        return args[0] % args[1]
    raise Unreadable(f"it captures the size {expr}, which no input has")
