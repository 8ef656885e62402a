"""From raw scores q·k to the weights: scale, soft-cap, mask and sinks, measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from fxfuse.graph.region import Region
from fxfuse.graph.view import argument, fake
from fxfuse.patterns.attention.factors import Factor, find_factors
from fxfuse.patterns.attention.masks import HARD, Explained, Mask, explain, spread_out
from fxfuse.patterns.attention.parts import Parts
from fxfuse.patterns.attention.score_paths import Followed, Target
from fxfuse.patterns.attention.softmax_weights import Weights, centred
from fxfuse.proof.evaluate import Evaluator
from fxfuse.proof.positions.claims import bounds_of, triangle
from fxfuse.proof.positions.decide import Holds
from fxfuse.recognise.answers import Reason
from fxfuse.recognise.literals import snap
from fxfuse.recognise.probe import Probe


@dataclass(frozen=True)
class Scores:
    scale: float
    softcap: float
    masks: tuple[Mask, ...]
    causal: bool
    sinks: Mask | float | None = None
    """A score for each row, or the same for all, that takes part in the softmax and has no key and no value."""
    from_leaves: bool = False
    """Is this true only for the constants that this program holds?"""
    factors: tuple[Factor, ...] = ()
    """What the scores are multiplied with beside the scale."""
    targets: tuple[Target, ...] = ()
    """The shapes that masks, sinks and factors broadcast against."""

    @property
    def users(self) -> list[Mask | Factor]:
        """What broadcasts against one of the targets."""
        return [*self.masks, *self.factors, *([self.sinks] if isinstance(self.sinks, Mask) else [])]

    def of_those_used(self) -> Scores:
        """The same without the targets that no mask, sink or factor broadcasts against."""
        sinks = self.sinks if isinstance(self.sinks, Mask) else None
        used = sorted({user.target for user in self.users})
        masks = tuple(replace(m, target=used.index(m.target)) for m in self.masks)
        factors = tuple(replace(f, target=used.index(f.target)) for f in self.factors)
        if sinks is not None:
            sinks = replace(sinks, target=used.index(sinks.target))
        targets = tuple(self.targets[n] for n in used)
        return replace(
            self, masks=masks, factors=factors, sinks=self.sinks if sinks is None else sinks, targets=targets
        )


def measure_scores(
    region: Region, parts: Parts, way: tuple[Region, Followed] | None, evaluator: Evaluator, ask: Probe
) -> Scores | Reason:
    """Measure what lies between the first product and the weights. A call of SDPA has it in its arguments."""
    if way is None:
        return _of_sdpa(region, parts.softmax, evaluator)
    answer = _measure(region, parts, way, evaluator, ask)
    if isinstance(answer, Reason):
        causal = _causal_by_constants(region, parts, way, evaluator, ask)
        if causal is not None:
            return causal
    return answer


def _measure(
    region: Region, parts: Parts, way: tuple[Region, Followed], evaluator: Evaluator, ask: Probe
) -> Scores | Reason:
    f = Weights(parts, *way, region, evaluator, ask, hold=False)
    drawn = ask.draws(f.nodes, evaluator, 41)
    for share in _KEPT:
        values = [_tossed(v, share, n) for n, v in enumerate(drawn)]
        bias, soft = _bias(f, values)
        if (soft.sum(-1) > 1).any():
            break
    total = f.total
    if not (soft.sum(-1) > 1).any():
        return Reason("softmax of a product, but nearly everything is masked")
    curve = _curve(f, region, values, bias, soft)
    if isinstance(curve, Reason):
        return curve
    scale, softcap, factors = curve
    found = explain(f, values, bias, soft)
    if isinstance(found, Reason):
        return found
    idle = tuple(p for p in found.idle if f.indices[p] not in {factor.index for factor in factors})
    sinks: Mask | float | None = None
    if not torch.allclose(total[soft.any(-1)], torch.ones((), dtype=torch.float64), rtol=1e-6):
        sinks = _sinks(f, values, found, idle, bias, soft)
        if sinks is None:
            return _other_sum(f, values, idle, total, soft)
    elif idle:
        names = ", ".join(f.nodes[p].name for p in idle)
        return Reason(f"softmax attention, but it also reads {names}, which changes no weight: leave it out", 2)
    return Scores(
        *(scale, softcap, found.masks),
        causal=False,
        sinks=sinks,
        from_leaves=bool(f.held),
        factors=factors,
        targets=tuple(f.targets),
    )


def _other_sum(
    f: Weights, values: list[torch.Tensor], idle: tuple[int, ...], total: torch.Tensor, soft: torch.Tensor
) -> Reason:
    """Why the weights do not sum to one."""
    rows = soft.any(-1)
    for place in idle:
        f(torch.zeros(f.shape, dtype=torch.float64), [2 * v if i == place else v for i, v in enumerate(values)])
        if torch.allclose(f.total[rows], 2 * total[rows], rtol=1e-6):
            name = f.nodes[place].name
            return Reason(
                f"softmax attention, but the weights do not sum to one: {name} multiplies them, and would have to "
                "multiply the result instead",
                3,
            )
    return Reason(
        "softmax of a product, but the weights do not sum to one, and what is missing is not one more score a row", 3
    )


_KEPT = (None, 0.95, 0.05)
"""How much of each boolean mask is True: as it was drawn; nearly all or nothing, where many masks hide too much."""


def _tossed(value: torch.Tensor, share: float | None, seed: int) -> torch.Tensor:
    if share is None or value.dtype != torch.bool:
        return value
    tossed = torch.rand(value.shape, generator=torch.Generator().manual_seed(seed)) < share
    if value.shape and value.shape[-1] > 1:
        tossed[..., 0], tossed[..., 1] = True, False
    return tossed


def _bias(f: Weights, values: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """log(weights) at scores of 0, and where keys are kept: in rows that see none, all are filled alike."""
    zeros = torch.zeros(f.shape, dtype=torch.float64)
    bias = f(zeros, values)
    soft = (bias > HARD) & bias.isfinite()
    moved = f(torch.linspace(0, 1, f.shape[-1], dtype=torch.float64).expand(f.shape), values) - bias
    alone = soft.sum(-1, keepdim=True) == 1
    return bias, soft & (alone | ((moved.abs() > 1e-12) & soft).any(-1, keepdim=True))


def _curve(
    f: Weights, region: Region, values: list[torch.Tensor], bias: torch.Tensor, soft: torch.Tensor
) -> tuple[float, float, tuple[Factor, ...]] | Reason:
    """Scale, soft-cap and factors: how log(weights) moves with the raw scores."""
    raw = torch.randn(f.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(42))
    change = centred(f(raw * 1e-3, values) - bias, soft)
    known = centred(raw * 1e-3, soft)
    scale = float((change * known).sum() / (known * known).sum())
    if not math.isfinite(scale):
        return Reason("softmax of a product, but of a function of the scores that has no slope at 0", 2)
    factors: tuple[Factor, ...] = ()
    f.multiplied = None
    if (
        _idle_floats(f, values)
        or scale == 0
        or not torch.allclose(change, known * scale, rtol=1e-3, atol=abs(scale) * 1e-6)
    ):
        found = find_factors(f, values, raw, soft)
        if isinstance(found, Reason):
            if scale == 0 or not torch.allclose(change, known * scale, rtol=1e-3, atol=abs(scale) * 1e-6):
                return found
        else:
            factors = found
            change = centred(f(raw * 1e-3, values) - bias, soft)
            scale = float((change * known).sum() / (known * known).sum())
    softcap = _softcap(f, values, bias, soft, scale, 100.0)
    if softcap:
        softcap = snap(_softcap(f, values, bias, soft, scale, softcap) or softcap, region)
    scale = snap(_precisely(f, values, bias, soft, raw / abs(scale), softcap), region, tolerance=1e-11)
    for magnitude in (0.1, 3.0, 60.0):
        x = raw * magnitude / abs(scale)
        expected = softcap * torch.tanh(x * scale / softcap) if softcap else x * scale
        if not torch.allclose(
            centred(f(x, values) - bias, soft), centred(expected, soft), rtol=1e-4, atol=1e-5 * magnitude
        ):
            return Reason(
                "softmax attention, but the scores pass through a function that is neither linear nor a soft-cap "
                "before the mask (clamped? capped after the mask?)",
                3,
            )
    return scale, softcap, factors


def _precisely(
    f: Weights, values: list[torch.Tensor], bias: torch.Tensor, soft: torch.Tensor, raw: torch.Tensor, softcap: float
) -> float:
    """The scale, measured again at scores of about 1 for its last digits; if there is a cap, its tanh is inverted
    first."""
    row = int((soft.reshape(-1, soft.shape[-1]).sum(-1) > 1).nonzero()[0])
    first, second = soft.reshape(-1, soft.shape[-1])[row].nonzero().flatten()[:2].tolist()
    x = float(raw.abs().max())
    opposite = torch.zeros(f.shape, dtype=torch.float64).reshape(-1, f.shape[-1])
    opposite[row, first], opposite[row, second] = x, -x
    answer = (f(opposite.reshape(f.shape), values) - bias).reshape(opposite.shape)[row]
    reached = float(answer[first] - answer[second]) / 2
    if softcap and abs(reached) < softcap:
        reached = softcap * math.atanh(reached / softcap)
    return reached / x


def _softcap(
    f: Weights, values: list[torch.Tensor], bias: torch.Tensor, soft: torch.Tensor, scale: float, x: float
) -> float:
    """Two scores, x and -x, differ by 2·cap·tanh(x/cap): solved for cap. 0 where they differ by 2·x."""
    row = int((soft.reshape(-1, soft.shape[-1]).sum(-1) > 1).nonzero()[0])
    first, second = soft.reshape(-1, soft.shape[-1])[row].nonzero().flatten()[:2].tolist()
    raw = torch.zeros(f.shape, dtype=torch.float64).reshape(-1, f.shape[-1])
    raw[row, first], raw[row, second] = x / scale, -x / scale
    answer = (f(raw.reshape(f.shape), values) - bias).reshape(raw.shape)[row]
    reached = float(answer[first] - answer[second]) / 2
    if abs(reached - x) < 1e-6 * x or not 0 < reached < x:
        return 0.0
    low, high = reached, 1e9
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (
            (middle, high) if middle * float(torch.tanh(torch.tensor(x / middle).double())) < reached else (low, middle)
        )
    return low


def _of_sdpa(region: Region, node: Node, evaluator: Evaluator) -> Scores | Reason:
    mask = argument(node, "attn_mask")
    scale = argument(node, "scale")
    query = argument(node, "query")
    masks: tuple[Mask, ...] = ()
    if isinstance(mask, Node):
        canonical = region.view.canonical(mask)
        if canonical not in region.others:
            return Reason("attention, but its mask is computed from q, k or v", 2)
        masks = (Mask(region.others.index(canonical), 0),)
    size = fake(query).shape[-1]
    if scale is not None and not isinstance(scale, (int, float)):
        return Reason("attention, but its scale is not a constant", 2)
    scale = size**-0.5 if scale is None else float(scale)
    targets = (_broadcast_against(node, evaluator),)
    return Scores(scale, 0.0, masks, bool(argument(node, "is_causal")), targets=targets if masks else ())


def _broadcast_against(node: Node, evaluator: Evaluator) -> Target:
    """What the mask of an SDPA call broadcasts against: the leading axes of its result, then queries and keys."""
    *lead, rows, _ = evaluator.sizes.shape(node)
    key = argument(node, "key")
    columns = evaluator.sizes.shape(key)[-2]
    shape = (*lead, rows, columns)
    return Target(shape, torch.arange(math.prod(shape)).reshape(-1, rows, columns))


def _sinks(
    f: Weights,
    values: list[torch.Tensor],
    found: Explained,
    idle: tuple[int, ...],
    bias: torch.Tensor,
    soft: torch.Tensor,
) -> Mask | float | None:
    """The sink, if the weights sum to less than one: which of the tensors that shift no score holds it, or which
    number?

    With scores of 0, log(weight) = mask - log(sum(exp(mask)) + exp(sink)), which is solved for the sink.
    """
    everything = torch.where(soft, found.total - bias, -math.inf).amax(-1)
    sink = everything + torch.log1p(-(found.total.logsumexp(-1) - everything).exp())
    rows = soft.any(-1)
    if not idle and torch.allclose(sink[rows], sink[rows][:1], rtol=1e-9, atol=1e-9):
        number = float(sink[rows][0])
        return 0.0 if abs(number) < 1e-9 else number
    for place in idle:
        for target in range(len(f.targets)):
            spread = spread_out(values[place], f, target, rows=True)
            if spread is not None and torch.allclose(sink[rows], spread[..., 0][rows], rtol=1e-6, atol=1e-6):
                return Mask(f.indices[place], target) if len(idle) == 1 else None
    return None


def _idle_floats(f: Weights, values: list[torch.Tensor]) -> bool:
    """Is one of the tensors a single number? Whether it scales the scores does not show in how they differ."""
    return any(v.is_floating_point() and v.numel() == 1 for v in values)


def _causal_by_constants(
    region: Region, parts: Parts, way: tuple[Region, Followed], evaluator: Evaluator, ask: Probe
) -> Scores | None:
    """A bias made of this program's constants alone that is 0 up to the diagonal and masks beyond it.

    At every length: each of the tensors is one number up to the diagonal, and one beyond it.
    """
    f = Weights(parts, *way, region, evaluator, ask, hold=True)
    if f.nodes or not f.held or f.shape[-1] != f.shape[-2]:
        return None
    if not all(_one_triangle(node, value, ask) for node, value in f.held.items()):
        return None
    bias, soft = _bias(f, [])
    lower = torch.ones(f.shape[-2:], dtype=torch.bool).tril().expand(f.shape)
    if not torch.equal(soft, lower) or centred(bias, soft).abs().max() > 1e-9:
        return None
    curve = _curve(f, region, [], bias, soft)
    return None if isinstance(curve, Reason) else Scores(*curve[:2], (), causal=True, from_leaves=True)


def _one_triangle(node: Node, value: torch.Tensor, ask: Probe) -> bool:
    """Is it one number up to the diagonal of its last two axes and one beyond it, at every size?"""
    if value.numel() == 1 or bool((value == value.flatten()[0]).all()):
        return ask.one_number(node, ask.evaluator(0)) is not None
    if value.dim() < 2:
        return False
    reader = ask.reader
    index = reader.index(node)
    row, column = index[-2:]
    low, high = value.reshape(-1, *value.shape[-2:])[0, 0, :2].tolist()
    given = bounds_of(reader, node, index)
    return isinstance(triangle(reader, node, index, row, column, low, high, given), Holds)
