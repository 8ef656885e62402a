"""Near misses: functions that look like an RMS norm, a rotation or attention, and mean something else.

Each stands in the same small context as the spellings (projections around it, batch and sequence dynamic) and names,
in words, what it does differently. What must come of it: nothing is fused, or what is fused computes the same, as for
a norm *inside* a gated one. `explained` marks those whose near miss the report should put in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, KV_HEADS, SIZE, LENGTH = 16, 4, 2, 8, 16
EPS = 1e-5


@dataclass(frozen=True)
class Mutant:
    """One near miss."""

    operator: str
    what: str
    function: Callable[..., Tensor]
    honest: Callable[..., Tensor]
    """What it is a mutant of: it must differ from this at some magnitude."""
    context: Callable[[Callable[..., Tensor]], nn.Module]
    explained: bool = False
    """The report has a near miss with a reason, at the function's line."""
    random: bool = False
    """It draws random numbers, so that nothing may be fused at all."""
    shape: tuple[int, int] | None = None
    """The only batch and length it works at, where there is only one."""

    def __str__(self) -> str:
        return f"{self.operator}: {self.what}"

    def lines(self) -> range:
        """Line numbers of the function in this file."""
        start = self.function.__code__.co_firstlineno
        last = max(line for *_, line in self.function.__code__.co_lines() if line is not None)
        return range(start, last + 1)


MUTANTS: list[Mutant] = []
SILENT = ("scaled by the length of what is turned",)
"""Near misses that nothing is fused of and that the report does not explain, though a reader would want to know."""


class Body(nn.Module):
    """The function as a module's ``forward``: of the model's lines, export records only those."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        code = function.__code__.replace(co_name="forward")
        self.body = FunctionType(code, function.__globals__, "forward")

    def __call__(self, *args: Tensor) -> Tensor:
        return self.body(*args)


class Norm(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.weight = nn.Parameter(torch.randn(WIDTH))
        self.function = Body(function)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.function(self.before(x), self.weight))


def normal(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def norm(
    what: str, *, explained: bool = False, shape: tuple[int, int] | None = None
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        MUTANTS.append(Mutant("RMSNormalization", what, function, normal, Norm, explained, shape=shape))
        return function

    return register


@norm("eps outside the root", explained=True)
def eps_outside(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + EPS) * weight


@norm("eps added to the input")
def eps_on_input(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt((x + 1e-3).pow(2).mean(-1, keepdim=True)) * weight


@norm("eps that multiplies")
def eps_multiplies(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) * (1 + 1e-2)) * weight


@norm("mean over the sequence")
def mean_over_sequence(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS) * weight


@norm("mean over the batch")
def mean_over_batch(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + EPS) * weight


@norm("mean over sequence and width")
def mean_over_both(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + EPS) * weight


@norm("mean over the heads, weight over a head")
def mean_over_heads(x: Tensor, weight: Tensor) -> Tensor:
    h = x.unflatten(-1, (HEADS, -1))
    h = h * torch.rsqrt(h.pow(2).mean(-2, keepdim=True) + EPS)
    return h.flatten(-2) * weight


@norm("keepdim lost where batch, sequence and width are equal", shape=(WIDTH, WIDTH))
def keepdim_lost(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1) + EPS) * weight


@norm("keepdim lost, then one dimension too far left", shape=(WIDTH, WIDTH))
def keepdim_elsewhere(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1).unsqueeze(1) + EPS) * weight


@norm("sum instead of mean")
def sum_for_mean(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS) * weight


@norm("divided by a norm that is clamped")
def clamped_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-2) * weight


@norm("F.normalize")
def normalize(x: Tensor, weight: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=1e-3) * weight


@norm("mean square clamped under the root")
def clamped_mean(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp(min=1e-2)) * weight


@norm("mean square clamped from above")
def clamped_above(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp(max=50.0) + EPS) * weight


@norm("layer norm: the mean is subtracted")
def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS) * weight


@norm("the variance under the root, nothing subtracted above it")
def by_variance(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + EPS) * weight


@norm("the unbiased mean, over one fewer")
def unbiased(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / (WIDTH - 1) + EPS) * weight


@norm("a weight that varies over the sequence: a gate")
def gated(x: Tensor, weight: Tensor) -> Tensor:
    gate = torch.sigmoid(x.flip(-1))
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * gate


@norm("a gate of the input itself")
def self_gated(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * F.silu(x)


@norm("a weight for every position")
def weight_by_position(x: Tensor, weight: Tensor) -> Tensor:
    ramp = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * (weight * (1 + ramp))


@norm("the mean square of the position before")
def neighbour(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.roll(1, 1).pow(2).mean(-1, keepdim=True) + EPS) * weight


@norm("a running mean over the sequence")
def running(x: Tensor, weight: Tensor) -> Tensor:
    count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
    mean = x.pow(2).mean(-1, keepdim=True).cumsum(1) / count
    return x * torch.rsqrt(mean + EPS) * weight


@norm("mean of magnitudes")
def mean_magnitude(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.abs().mean(-1, keepdim=True) + EPS) * weight


@norm("largest magnitude")
def largest(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.abs().amax(-1, keepdim=True) + EPS) * weight


@norm("fourth root")
def fourth_root(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + EPS).pow(-0.25) * weight


@norm("fourth power under a fourth root")
def fourth_power(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.pow(4).mean(-1, keepdim=True) + EPS**2).pow(-0.25) * weight


@norm("no root at all")
def no_root(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS) * weight


@norm("mean over the first half of the width")
def partial_mean(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x[..., : WIDTH // 2].pow(2).mean(-1, keepdim=True) + EPS) * weight


@norm("a weighted mean")
def weighted_mean(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt((x.pow(2) * weight.softmax(-1)).sum(-1, keepdim=True) + EPS) * weight


@norm("ReLU above the root, everything under it")
def rectified(x: Tensor, weight: Tensor) -> Tensor:
    return F.relu(x) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


@norm("clamped afterwards")
def clamped_result(x: Tensor, weight: Tensor) -> Tensor:
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)).clamp(-1.5, 1.5) * weight


@norm("a bias")
def biased(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight + weight.cos()


@norm("eps that depends on the data")
def eps_of_data(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x.mean().abs()) * weight


# Rotations: x [B, S, H, D], cos and sin [S, D/2], of positions 0…S.


class Rotation(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = (
            nn.Linear(WIDTH, HEADS * SIZE, bias=False),
            nn.Linear(HEADS * SIZE, WIDTH, bias=False),
        )
        angle = torch.outer(torch.arange(LENGTH).float() + 1, 20.0 ** -(torch.arange(SIZE // 2) / (SIZE // 2)))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.function = Body(function)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x).unflatten(-1, (HEADS, SIZE))
        length = x.shape[1]
        return self.after(self.function(h, self.cos[:length], self.sin[:length]).flatten(-2))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def rotated_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def rotation(
    what: str, *, explained: bool = False, honest: Callable[..., Tensor] = rotated
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        MUTANTS.append(Mutant("RotaryEmbedding", what, function, honest, Rotation, explained))
        return function

    return register


@rotation("cos and sin swapped")
def swapped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = torch.cat((cos, cos), -1)[:, None], torch.cat((sin, sin), -1)[:, None]
    return x * sin + rotate_half(x) * cos


@rotation("the sign of one half flipped", explained=True)
def one_sign(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos + b * sin, b * cos + a * sin), -1)


@rotation("both signs flipped: turned back")
def both_signs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos + b * sin, b * cos - a * sin), -1)


@rotation("halves crossed in the second row")
def crossed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, a * cos + b * sin), -1)


@rotation("halves crossed at the end")
def crossed_result(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((b * cos + a * sin, a * cos - b * sin), -1)


@rotation("different angles on the two rows", explained=True)
def two_angles(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = torch.cat((cos, cos.flip(-1)), -1)[:, None], torch.cat((sin, sin.flip(-1)), -1)[:, None]
    return x * cos + rotate_half(x) * sin


@rotation("sin of other frequencies on the second row only", explained=True)
def two_sines(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin.roll(1, -1)), -1)


@rotation("interleaved pairs with the caches of halves", honest=rotated_pairs)
def pairs_with_caches_of_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = torch.cat((cos, cos), -1)[:, None], torch.cat((sin, sin), -1)[:, None]
    swapped = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + swapped * sin


@rotation("halves with the caches of interleaved pairs")
def halves_with_caches_of_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.repeat_interleave(2, -1)[:, None], sin.repeat_interleave(2, -1)[:, None]
    return x * cos + rotate_half(x) * sin


@rotation("taken apart as pairs, put together as halves")
def pairs_to_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@rotation("cos of other positions for half of the heads")
def half_of_the_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos = torch.stack((cos, cos, cos.flip(0), cos.flip(0)), 1)
    sin = sin[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@rotation("other frequencies for every head")
def by_head(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    angle = torch.atan2(sin, cos)[:, None] * torch.arange(1, HEADS + 1)[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


@rotation("other positions for every batch row")
def by_batch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turn = torch.arange(x.shape[0], dtype=x.dtype)[:, None, None, None]
    angle = torch.atan2(sin, cos)[:, None] * (1 + turn)
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


@rotation("scaled by the length of what is turned")
def scaled_by_norm(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None] * x.norm(dim=-1, keepdim=True), sin[:, None] * x.norm(dim=-1, keepdim=True)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@rotation("scaled position by position")
def scaled_by_position(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    grown = 1.02 ** torch.arange(x.shape[1], dtype=x.dtype)[:, None]
    return rotated(x, cos * grown, sin * grown)


@rotation("one half scaled")
def half_scaled(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, 1.1 * (b * cos + a * sin)), -1)


@rotation("angles that depend on what is turned")
def angles_of_data(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    angle = torch.atan2(sin, cos)[:, None] + a
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


@rotation("a constant added")
def shifted(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin + 0.1, b * cos + a * sin), -1)


@rotation("not linear in what is turned")
def product(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin * a, b * cos + a * sin), -1)


@rotation("turned with the neighbour in the sequence")
def along_the_sequence(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    before = a.roll(1, 1)
    return torch.cat((before * cos - b * sin, b * cos + before * sin), -1)


@rotation("turned with another head")
def across_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = torch.cat((cos, cos), -1)[:, None], torch.cat((sin, sin), -1)[:, None]
    a, b = x.chunk(2, -2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -2)


@rotation("each turned with the next but one")
def wrong_partner(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = torch.cat((cos, cos), -1)[:, None], torch.cat((sin, sin), -1)[:, None]
    return x * cos + x.roll(2, -1) * sin


@rotation("sheared: one row turned only")
def sheared(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos[:, None] - b * sin[:, None], b), -1)


@rotation("the first half turned, the rest doubled")
def rest_doubled(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    part, rest = x.chunk(2, -1)
    a, b = part.chunk(2, -1)
    cos, sin = cos[:, None, : SIZE // 4], sin[:, None, : SIZE // 4]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest * 2), -1)


@rotation("the first half turned, the rest reversed")
def rest_reversed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    part, rest = x.chunk(2, -1)
    a, b = part.chunk(2, -1)
    cos, sin = cos[:, None, : SIZE // 4], sin[:, None, : SIZE // 4]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest.flip(-1)), -1)


@rotation("sin of the positions before")
def late_sine(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotated(x, cos, sin.roll(1, 0))


@rotation("the conjugate product", honest=rotated_pairs)
def conjugate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()).conj() * torch.complex(cos, sin)[:, None]
    return torch.view_as_real(z).flatten(-2)


@rotation("clamped before")
def clamped_input(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.clamp(-1, 1).chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@rotation("some heads turned, some not")
def some_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat((rotated(x[..., :2, :], cos, sin), x[..., 2:, :]), -2)


@rotation("turned twice, by positions and by their squares")
def turned_twice(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotated(rotated(x, cos, sin), cos * cos - sin * sin, 2 * sin * cos)


# Attention: q [B, H, S, D], k and v [B, Hkv, T, D].


class SelfAttention(nn.Module):
    keys_from_memory = False

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(WIDTH, HEADS * SIZE, bias=False)
        self.k = nn.Linear(WIDTH, KV_HEADS * SIZE, bias=False)
        self.v = nn.Linear(WIDTH, KV_HEADS * SIZE, bias=False)
        self.after = nn.Linear(HEADS * SIZE, WIDTH, bias=False)
        self.function = Body(function)

    def forward(self, x: Tensor) -> Tensor:
        memory = torch.cat((x, x[:, :2].flip(-1)), 1) if self.keys_from_memory else x
        q, k, v = self.q(x), self.k(memory), self.v(memory)
        q, k, v = (h.unflatten(-1, (-1, SIZE)).transpose(1, 2) for h in (q, k, v))
        return self.after(self.function(q, k, v).transpose(1, 2).flatten(2))


class MoreKeys(SelfAttention):
    """Two more keys than queries."""

    keys_from_memory = True


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.repeat_interleave(2, 1).transpose(-1, -2) * SIZE**-0.5


def triangle(scores: Tensor, diagonal: int = 0) -> Tensor:
    return torch.ones(scores.shape[-2], scores.shape[-1], dtype=torch.bool).tril(diagonal)


def values_of(weights: Tensor, v: Tensor) -> Tensor:
    return weights @ v.repeat_interleave(2, 1)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return values_of(scores.masked_fill(~triangle(scores), -math.inf).softmax(-1), v)


def unmasked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return values_of(scores_of(q, k).softmax(-1), v)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = 5 * torch.tanh(scores_of(q, k) / 5)
    return values_of(scores.masked_fill(~triangle(scores), -math.inf).softmax(-1), v)


def attention(
    what: str,
    *,
    explained: bool = False,
    honest: Callable[..., Tensor] = unmasked,
    random: bool = False,
    context: Callable[[Callable[..., Tensor]], nn.Module] = SelfAttention,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        MUTANTS.append(Mutant("Attention", what, function, honest, context, explained, random))
        return function

    return register


@attention("softmax over the queries")
def softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return values_of(scores_of(q, k).softmax(-2), v)


@attention("softmax over the heads")
def softmax_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return values_of(scores_of(q, k).softmax(1), v)


@attention("softmax over keys and heads together")
def softmax_over_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k).transpose(1, 2)
    weights = scores.flatten(2).softmax(-1).view(scores.shape) * HEADS
    return values_of(weights.transpose(1, 2), v)


@attention("dropout that is active", random=True)
def active_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return values_of(F.dropout(scores_of(q, k).softmax(-1), 0.3, training=True), v)


@attention("dropout that is active, inside SDPA", random=True)
def active_dropout_in_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, enable_gqa=True)


@attention("noise on the scores", random=True)
def noisy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return values_of((scores + torch.rand_like(scores)).softmax(-1), v)


@attention("keys and values in the order of repeat")
def repeat_order(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
    return (q @ k.transpose(-1, -2) * SIZE**-0.5).softmax(-1) @ v


@attention("keys and values in the order of repeat, SDPA")
def repeat_order_in_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))


@attention("only the values in the order of repeat")
def mixed_order(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).softmax(-1) @ v.repeat(1, 2, 1, 1)


@attention("values of the other heads")
def flipped_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return values_of(scores_of(q, k).softmax(-1), v.flip(1))


@attention("causal, but one key of the future is seen", honest=causal)
def causal_and_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return values_of(scores.masked_fill(~triangle(scores, 1), -math.inf).softmax(-1), v)


@attention("causal, but a query does not see its own key", honest=causal)
def causal_without_self(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    seen = triangle(scores, -1) | (torch.arange(scores.shape[-1]) == 0)
    return values_of(scores.masked_fill(~seen, -math.inf).softmax(-1), v)


@attention("causal, to the bottom right of more keys than queries", honest=causal, context=MoreKeys)
def bottom_right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    seen = torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None] + (k.shape[2] - q.shape[2])
    return values_of(scores.masked_fill(~seen, -math.inf).softmax(-1), v)


@attention("causal, to the top left of more keys than queries", honest=bottom_right, context=MoreKeys)
def top_left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@attention("looking ahead instead of back", honest=causal)
def looking_ahead(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return values_of(scores.masked_fill(~triangle(scores).mT, -math.inf).softmax(-1), v)


@attention("causal for half of the heads", honest=causal)
def half_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    bound = (torch.arange(HEADS) < 2)[:, None, None]
    return values_of(scores.masked_fill(~triangle(scores) & bound, -math.inf).softmax(-1), v)


@attention("soft-cap after the mask", honest=capped, explained=True)
def cap_after_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    scores = scores.masked_fill(~triangle(scores), -math.inf)
    return values_of((5 * torch.tanh(scores / 5)).softmax(-1), v)


@attention("a finite mask added before the soft-cap", honest=capped)
def mask_before_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    scores = scores + torch.zeros_like(scores).masked_fill(~triangle(scores), -4.0)
    return values_of((5 * torch.tanh(scores / 5)).softmax(-1), v)


@attention("a finite mask added before the scale", honest=causal)
def mask_before_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2)
    bias = torch.arange(scores.shape[-1], dtype=scores.dtype) * -0.7
    return values_of(((scores + bias) * SIZE**-0.5).softmax(-1), v)


@attention("soft-cap without its division", honest=capped)
def cap_undivided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return values_of((5 * torch.tanh(scores_of(q, k))).softmax(-1), v)


@attention("soft-cap by a sigmoid", honest=capped)
def cap_by_sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return values_of((5 * torch.sigmoid(scores_of(q, k) / 5)).softmax(-1), v)


@attention("scores clamped", explained=True)
def clamped_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return values_of(scores_of(q, k).clamp(-1.0, 1.0).softmax(-1), v)


@attention("scores clamped from far above")
def clamped_far(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return values_of(scores_of(q, k).clamp(-50.0, 50.0).softmax(-1), v)


@attention("scale applied twice")
def scaled_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return values_of((scores_of(q, k) * SIZE**-0.5).softmax(-1), v)


@attention("a scale for every head")
def scaled_by_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return values_of((scores_of(q, k) * torch.arange(1.0, HEADS + 1)[:, None, None]).softmax(-1), v)


@attention("a scale that depends on the scores")
def scaled_by_data(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return values_of((scores * scores.abs().mean()).softmax(-1), v)


@attention("sigmoid instead of softmax")
def by_sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return values_of(scores_of(q, k).sigmoid(), v)


@attention("ReLU squared instead of softmax")
def by_relu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.relu(scores_of(q, k)).square()
    return values_of(weights / (weights.sum(-1, keepdim=True) + 1e-6), v)


@attention("exponentials that are not normalised")
def unnormalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return values_of(scores_of(q, k).exp(), v)


@attention("softmax with one more in the denominator")
def softmax_plus_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores_of(q, k).clamp(max=60.0).exp()
    return values_of(e / (1 + e.sum(-1, keepdim=True)), v)


@attention("a sink that takes its share")
def sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    weights = torch.cat((scores, torch.zeros_like(scores[..., :1])), -1).softmax(-1)[..., :-1]
    return values_of(weights, v)


@attention("the logarithm of the softmax")
def log_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return values_of(scores_of(q, k).log_softmax(-1), v)


@attention("softmax twice")
def softmax_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return values_of(scores_of(q, k).softmax(-1).softmax(-1), v)


@attention("weights divided by the largest")
def by_largest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores_of(q, k).softmax(-1)
    return values_of(weights / weights.amax(-1, keepdim=True), v)


@attention("weights squared and normalised again")
def squared_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores_of(q, k).softmax(-1).square()
    return values_of(weights / weights.sum(-1, keepdim=True), v)


@attention("weights normalised again over the queries")
def normalised_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores_of(q, k).softmax(-1)
    return values_of(weights / weights.sum(-2, keepdim=True), v)


@attention("weights masked afterwards, not normalised again", honest=causal)
def masked_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores_of(q, k).softmax(-1)
    return values_of(weights * triangle(weights), v)


@attention("small weights dropped")
def dropped_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores_of(q, k).softmax(-1)
    return values_of(torch.where(weights > 0.1, weights, 0.0), v)


@attention("a bias added to the weights")
def biased_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return values_of(scores_of(q, k).softmax(-1) + 0.01, v)


@attention("weights transposed")
def transposed_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return values_of(scores_of(q, k).softmax(-1).mT, v)


@attention("heads mixed between scores and softmax")
def talking_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mix = torch.eye(HEADS) + 0.3
    return values_of(torch.einsum("bhqk,hi->biqk", scores_of(q, k), mix).softmax(-1), v)


@attention("only the three best keys")
def best_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    least = scores.topk(3, -1).values[..., -1:]
    return values_of(scores.masked_fill(scores < least, -math.inf).softmax(-1), v)


@attention("distances instead of products")
def distances(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    apart = q.unsqueeze(-2) - k.repeat_interleave(2, 1).unsqueeze(-3)
    return values_of((-0.5 * apart.square().sum(-1)).softmax(-1), v)


@attention("rounded scores")
def rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return values_of(torch.round(scores_of(q, k) * 4).mul(0.25).softmax(-1), v)


@attention("values made nonlinear by the weights")
def nonlinear_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores_of(q, k).softmax(-1)
    spread = v.repeat_interleave(2, 1).unsqueeze(2)
    return torch.tanh(weights.unsqueeze(-1) * spread).sum(-2)


@attention("the result made nonlinear")
def nonlinear_result(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.tanh(values_of(scores_of(q, k).softmax(-1), v))


@attention("the query added to the result")
def residual(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return values_of(scores_of(q, k).softmax(-1), v) + q
