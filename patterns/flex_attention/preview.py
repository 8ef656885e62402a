"""A flex_attention that stays one, as FlexAttention of ai.onnx.preview: its mods are kept as they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxfuse.graph.view import fake
from fxfuse.patterns.flex_attention.expression import INDICES
from fxfuse.patterns.flex_attention.forms import Problem, batched, cast, conjunction, laid_out
from fxfuse.recognise.answers import Form


def is_constant(problem: Problem) -> bool:
    """Do the mods look neither at the score nor at a position? There is no function of the scores then."""
    leaves = problem.score.leaves.union(*(condition.leaves for condition in problem.mask))
    return not leaves & {"score", *INDICES}


def preview_form(problem: Problem) -> Form:
    """`fxfuse::flex_scores`, the mods, `fxfuse::flex_output`; in float32 at least, as flex_attention scores."""
    out = fake(problem.region.output).dtype

    def attention(*inputs: Tensor) -> Tensor:
        working = torch.promote_types(inputs[0].dtype, torch.float32)
        q, k, v = (cast(t, working) for t in inputs[:3])
        k, v = batched(k, q), batched(v, q)
        # ONNX takes the scale's root.
        q, scale = (-q, -problem.call.scale) if problem.call.scale < 0 else (q, problem.call.scale)
        raw, *positions = torch.ops.fxfuse.flex_scores(q, k, scale=scale)
        lengths = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        grid = problem.grid(inputs, lengths, raw, positions)
        scores: Tensor = grid(problem.score)
        kept = conjunction(problem.mask, grid)
        if kept is not None:
            scores = torch.where(kept, scores, -math.inf)
        scores = cast(scores, working)
        if "score" not in problem.score.leaves:
            scores = scores.expand(lengths)
        y: Tensor = torch.ops.fxfuse.flex_output(scores, v)
        y = y if problem.in_memory_BSHD else laid_out(y)
        return y if inputs[0].dtype == torch.float64 else cast(y, out)

    return attention
