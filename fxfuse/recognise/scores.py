"""From raw scores q·k to the weights: scale, soft-cap and mask, measured.

Weights are read as log(weights), which is the score up to one number a row: so softmax, its shifted and its written-out
spellings all look the same from outside.
"""

from __future__ import annotations

import math
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

HARD = -600.0
"""A bias below this masks: exp of it is 0 in every dtype."""


@dataclass(frozen=True)
class Mask:
    """One tensor that masks or biases the scores."""

    index: int
    """Which of `Region.others` it is."""
    keeps: bool = True
    """A boolean mask is True where a key is kept (False: where it is dropped); a bias is added (False: subtracted)."""
    finite: bool = False
    """A boolean mask fills with a large finite number: a row with no key at all averages, instead of being 0."""


@dataclass(frozen=True)
class Scores:
    scale: float
    softcap: float
    masks: tuple[Mask, ...]
    causal: bool
    rank: int
    """Rank of the scores that the masks broadcast against."""


def measure_scores(region: Region, parts: Parts, evaluator: Evaluator, ask: Questions) -> Scores | Reason:
    """Ask the way from the product to the weights; SDPA says it in its arguments."""
    if op_name(parts.softmax) == SDPA:
        return _of_sdpa(region, parts.softmax)
    f = _way(region, parts, evaluator, ask)
    if isinstance(f, Reason):
        return f
    biases = ask.draws(f.nodes, evaluator, 41)
    raw = torch.randn(f.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(42))
    bias = f(torch.zeros(f.shape, dtype=torch.float64), biases)
    soft = (bias > HARD) & bias.isfinite()
    if f.sums != 1.0:
        return Reason("softmax of a product, but the weights do not sum to one (sinks? a second factor?)", 3)
    if not (soft.sum(-1) > 1).any():
        return Reason("softmax of a product, but nearly everything is masked")
    change = _centred(f(raw * 1e-3, biases) - bias, soft)
    known = _centred(raw * 1e-3, soft)
    scale = float((change * known).sum() / (known * known).sum())
    if (
        not math.isfinite(scale)
        or scale == 0
        or not torch.allclose(change, known * scale, rtol=1e-3, atol=abs(scale) * 1e-6)
    ):
        return Reason("softmax of a product, but the scores are not scaled by one constant", 2)
    softcap = _softcap(f, biases, bias, soft, scale)
    softcap = snap(softcap, region) if softcap else 0.0
    scale = snap(scale, region, tolerance=1e-5)
    for magnitude in (0.1, 3.0, 60.0):
        x = raw * magnitude / abs(scale)
        expected = softcap * torch.tanh(x * scale / softcap) if softcap else x * scale
        if not torch.allclose(
            _centred(f(x, biases) - bias, soft), _centred(expected, soft), rtol=1e-4, atol=1e-5 * magnitude
        ):
            return Reason(
                "softmax attention, but the scores pass through a function that is neither linear nor a soft-cap "
                "before the mask (clamped? capped after the mask?)",
                3,
            )
    masks = _explain(bias, soft, biases, f)
    return masks if isinstance(masks, Reason) else Scores(scale, softcap, masks, causal=False, rank=f.rank)


def _softcap(f: _Way, biases: list[torch.Tensor], bias: torch.Tensor, soft: torch.Tensor, scale: float) -> float:
    """Two scores, x and -x, differ by 2·cap·tanh(x/cap): solved for cap. 0 where they differ by 2·x."""
    row = int((soft.reshape(-1, soft.shape[-1]).sum(-1) > 1).nonzero()[0])
    first, second = soft.reshape(-1, soft.shape[-1])[row].nonzero().flatten()[:2].tolist()
    x = 100.0
    raw = torch.zeros(f.shape, dtype=torch.float64).reshape(-1, f.shape[-1])
    raw[row, first], raw[row, second] = x / scale, -x / scale
    answer = (f(raw.reshape(f.shape), biases) - bias).reshape(raw.shape)[row]
    reached = float(answer[first] - answer[second]) / 2
    if abs(reached - x) < 1e-6 * x or not 0 < reached < x:
        return 0.0
    low, high = reached, 1e6
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (
            (middle, high) if middle * float(torch.tanh(torch.tensor(x / middle).double())) < reached else (low, middle)
        )
    return low


def _centred(t: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """Less its mean over the kept keys of each row, which softmax does not see; 0 where nothing is kept."""
    kept = torch.where(soft, t, 0.0)
    return torch.where(soft, kept - kept.sum(-1, keepdim=True) / soft.sum(-1, keepdim=True).clamp(min=1), 0.0)


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
    """log(weights) as a function of the raw product, masks given; both in the shape of the anchor's input."""

    def __init__(self, parts: Parts, way: Region, region: Region, evaluator: Evaluator, ask: Questions) -> None:
        assert parts.scores is not None and parts.weighted is not None
        self._product, self._weighted = parts.scores, parts.weighted
        self._way = way
        self._evaluator = evaluator
        self.sums = 1.0
        """What the weights of a row with keys last summed to, where not 1."""
        logits = parts.softmax.args[0]
        assert isinstance(logits, Node)
        self.shape = evaluator.sizes.shape(logits)
        self.rank = len(self.shape)
        raw = evaluator.sizes.shape(parts.scores.node)
        numbers = torch.arange(torch.Size(raw).numel()).reshape(raw)
        self._places = parts.scores.result(numbers).reshape(-1)
        self._raw = raw
        self._added: tuple[Node, ...] = (
            () if parts.scores.added is None else (region.view.canonical(parts.scores.added),)
        )
        read = dict.fromkeys((*way.others, *self._added))
        self.nodes = tuple(n for n in read if n in region.others)
        # Read for their dtype alone (`type_as(q)`); were their values used, the answers would not fit.
        beside = [n for n in read if n not in region.others]
        self._beside = dict(zip(beside, ask.draws(beside, evaluator, 43), strict=True))
        self.indices = tuple(region.others.index(n) for n in self.nodes)

    def __call__(self, scores: torch.Tensor, values: list[torch.Tensor]) -> torch.Tensor:
        held = {**self._beside, **dict(zip(self.nodes, values, strict=True))}
        raw = torch.empty(self._places.numel(), dtype=torch.float64)
        raw[self._places] = scores.reshape(-1)
        raw = raw.reshape(self._raw)
        if self._product.added is not None:
            raw = self._product.alpha * raw + self._product.beta * held[self._added[0]]
        weights = self._evaluator.region(self._way, [raw, *(held[n] for n in self._way.others)])
        weights = self._weighted.rows(weights).reshape(self.shape)
        total = weights.sum(-1)
        off = total[total > 0.5 if (total > 0.5).any() else total != 0]
        if off.numel() and not torch.allclose(off, torch.ones_like(off), rtol=1e-6):
            self.sums = off.flatten()[0].item()
        return weights.log()


def _way(region: Region, parts: Parts, evaluator: Evaluator, ask: Questions) -> _Way | Reason:
    assert parts.scores is not None and parts.weighted is not None
    weights = parts.weighted.left
    way = between(region.view, weights, [parts.scores.node], lambda _: True)
    if way is None:
        return Reason("softmax of a product, but the scores are changed by more than scale, soft-cap and mask", 2)
    logits = parts.softmax.args[0]
    assert isinstance(logits, Node)
    sizes = [torch.Size(evaluator.sizes.shape(n)).numel() for n in (parts.scores.node, logits, weights)]
    if len(set(sizes)) > 1:
        return Reason("softmax attention, but over more than the scores (attention sinks?)", 3)
    return _Way(parts, way, region, evaluator, ask)


def _explain(bias: torch.Tensor, soft: torch.Tensor, values: list[torch.Tensor], f: _Way) -> tuple[Mask, ...] | Reason:
    """Which tensors, read as additive or boolean masks, give this bias?"""
    wanted = _centred(bias, soft)
    reachable = soft.any(-1, keepdim=True)
    for keeps in choices((True, False), repeat=len(values)):
        total = torch.zeros(f.shape, dtype=torch.float64)
        try:
            for value, keep in zip(values, keeps, strict=True):
                if value.dtype == torch.bool:
                    total = total.masked_fill(~value if keep else value, float("-inf"))
                else:
                    total = total + (value if keep else -value)
        except RuntimeError:
            break
        kept = total > total.amax(-1, keepdim=True) + HARD
        if torch.equal(kept & reachable, soft) and torch.allclose(_centred(total, soft), wanted, rtol=1e-7, atol=1e-7):
            return tuple(
                Mask(i, k, v.dtype == torch.bool and _averages(f, values, place, k))
                for place, (i, k, v) in enumerate(zip(f.indices, keeps, values, strict=True))
            )
    return Reason(
        "softmax attention, but its mask is neither added to the scores nor a boolean that keeps or drops keys", 3
    )


def _averages(f: _Way, values: list[torch.Tensor], place: int, keeps: bool) -> bool:
    """Does a row with no key kept average over all of them (a finite fill), or is it undefined?"""
    dropped = [torch.full_like(v, not keeps) if i == place else v for i, v in enumerate(values)]
    return bool(f(torch.zeros(f.shape, dtype=torch.float64), dropped).isfinite().any())
