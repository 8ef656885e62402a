"""From raw scores q·k to the softmax: scale, soft-cap and mask, measured."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product as choices

import torch
from torch.fx import Node

from fxfuse.graph.region import Region, between
from fxfuse.graph.view import argument, fake, op_name
from fxfuse.recognise.answers import Reason
from fxfuse.recognise.attention_parts import SDPA, Parts
from fxfuse.recognise.evaluate import Evaluator
from fxfuse.recognise.literals import snap
from fxfuse.recognise.questions import Questions

HARD = -1e4
"""A bias below this masks: exp of it is 0 in every dtype."""


@dataclass(frozen=True)
class Mask:
    """One tensor that masks or biases the scores."""

    index: int
    """Which of `Region.others` it is."""
    keeps: bool = True
    """A boolean mask that is True where a key is *kept*; False where True means masked."""


@dataclass(frozen=True)
class Scores:
    scale: float
    softcap: float
    masks: tuple[Mask, ...]
    causal: bool
    rank: int
    """Rank of the scores that the masks broadcast against."""


def measure_scores(region: Region, parts: Parts, evaluator: Evaluator, ask: Questions) -> Scores | Reason:
    """Ask the way from the product to the softmax; SDPA says it in its arguments."""
    if op_name(parts.softmax) == SDPA:
        return _of_sdpa(region, parts.softmax)
    f = _way(region, parts, evaluator)
    if isinstance(f, Reason):
        return f
    biases = f.draws(ask, 41)
    bias = f(torch.zeros(f.shape, dtype=torch.float64), biases)
    soft = bias > HARD
    gen = torch.Generator().manual_seed(42)
    raw = torch.randn(f.shape, dtype=torch.float64, generator=gen)
    slope = ((f(raw * 1e-3, biases) - bias) / (raw * 1e-3))[soft]
    scale = slope.median().item() if slope.numel() else 0.0
    if not slope.numel() or scale == 0 or not torch.allclose(slope, torch.full_like(slope, scale), rtol=1e-3):
        return Reason("softmax of a product, but the scores are not scaled by one constant", 2)
    softcap = 0.0
    far = (f(raw * 1e6 / scale, biases) - bias)[soft]
    if not torch.allclose(far, raw[soft] * 1e6, rtol=1e-6):
        softcap = snap(far.abs().max().item(), region)
    scale = snap(scale, region, tolerance=1e-6)
    for magnitude in (0.1, 3.0, 100.0):
        x = raw * magnitude / abs(scale)
        expected = softcap * torch.tanh(x * scale / softcap) if softcap else x * scale
        if not torch.allclose((f(x, biases) - bias)[soft], expected[soft], rtol=1e-5, atol=1e-6):
            return Reason("softmax attention, but the scores pass through a function that is neither linear nor a "
                          "soft-cap before the mask (clamped? capped after the mask?)", 3)  # fmt: skip
    masks = _explain(bias, biases, f)
    return masks if isinstance(masks, Reason) else Scores(scale, softcap, masks, causal=False, rank=f.rank)


def _of_sdpa(region: Region, node: Node) -> Scores | Reason:
    mask = argument(node, "attn_mask")
    scale = argument(node, "scale")
    masks: tuple[Mask, ...] = ()
    if isinstance(mask, Node):
        canonical = region.view.canonical(mask)
        if canonical not in region.others:
            return Reason("attention, but its mask is computed from q, k or v", 2)
        masks = (Mask(region.others.index(canonical)),)
    query = argument(node, "query")
    size = fake(query).shape[-1]
    if scale is not None and not isinstance(scale, (int, float)):
        return Reason("attention, but its scale is not a constant", 2)
    rank = fake(query).dim()
    return Scores(size**-0.5 if scale is None else float(scale), 0.0, masks, bool(argument(node, "is_causal")), rank)


class _Way:
    """The softmax's input as a function of the raw product, masks given; in the product's canonical shape."""

    def __init__(self, parts: Parts, way: Region | None, region: Region, evaluator: Evaluator) -> None:
        assert parts.scores is not None
        self._product = parts.scores
        self._way = way
        self._evaluator = evaluator
        logits = parts.softmax.args[0]
        assert isinstance(logits, Node)
        self.final_shape = evaluator.sizes.shape(logits)
        self.rank = len(self.final_shape)
        self.shape = evaluator.sizes.shape(parts.scores.node)
        added = () if parts.scores.added is None else (region.view.canonical(parts.scores.added),)
        self.nodes = tuple(dict.fromkeys((*(way.others if way is not None else ()), *added)))
        self.indices = tuple(region.others.index(n) for n in self.nodes)

    def draws(self, ask: Questions, seed: int) -> list[torch.Tensor]:
        return ask.draws(self.nodes, self._evaluator, seed)

    def __call__(self, raw: torch.Tensor, values: list[torch.Tensor]) -> torch.Tensor:
        held = dict(zip(self.nodes, values, strict=True))
        if self._product.added is not None:
            added = values[-1]
            raw = self._product.alpha * raw + self._product.beta * added
        if self._way is None:
            return raw
        out = self._evaluator.region(self._way, [raw, *(held[n] for n in self._way.others)])
        return out.reshape(self.shape)


def _way(region: Region, parts: Parts, evaluator: Evaluator) -> _Way | Reason:
    assert parts.scores is not None
    logits = parts.softmax.args[0]
    assert isinstance(logits, Node)
    way = None
    if logits is not parts.scores.node:
        way = between(region.view, logits, [parts.scores.node], lambda _: True)
        if way is None or not set(way.others) <= set(region.others):
            return Reason("softmax of a product, but the scores are changed by more than scale, soft-cap and mask", 2)
    f = _Way(parts, way, region, evaluator)
    if torch.Size(f.final_shape).numel() != torch.Size(f.shape).numel():
        return Reason("softmax attention, but over more than the scores (attention sinks?)", 3)
    return f


def _explain(bias: torch.Tensor, values: list[torch.Tensor], f: _Way) -> tuple[Mask, ...] | Reason:
    """Which tensors, read as additive or boolean masks, give this bias?"""
    hard = bias <= HARD
    options = [(True, False) if v.dtype == torch.bool else (True,) for v in values]
    for keeps in choices(*options):
        total = torch.zeros(f.final_shape, dtype=torch.float64)
        try:
            for value, keep in zip(values, keeps, strict=True):
                if value.dtype == torch.bool:
                    total = total.masked_fill(~value if keep else value, float("-inf"))
                else:
                    total = total + value
        except RuntimeError:
            break
        total = total.reshape(f.shape)
        same_hard = torch.equal(total <= HARD, hard)
        if same_hard and torch.allclose(total[~hard], bias[~hard], rtol=1e-9, atol=1e-9):
            return tuple(Mask(i, k) for i, k in zip(f.indices, keeps, strict=True))
    if not values and not hard.any() and bias.abs().max() == 0:
        return ()
    return Reason(
        "softmax attention, but its mask is neither added to the scores nor a boolean that keeps or drops keys", 3
    )
