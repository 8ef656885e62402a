"""The attention weights as a function of the raw scores and of the tensors beside them.

The weights are read as log(weights). That is the score, but for one number that all keys of a row share; so softmax,
its shifted and its written-out spellings look the same from outside.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fxfuse.graph.region import Region, between
from fxfuse.graph.view import fake, op_name
from fxfuse.patterns.attention.parts import Parts
from fxfuse.patterns.attention.score_paths import Followed, follow
from fxfuse.proof.evaluate import CannotEvaluate, Evaluator
from fxfuse.recognise.answers import Reason
from fxfuse.recognise.probe import Probe


class Weights:
    """log(weights) as a function of the raw product, ``[N, S, T]``, and of the values of `nodes`.

    Args:
        way: from the first product to the weights that enter the second.
        followed: where its scores go.
        hold: every tensor that no input has a part in keeps its value in this program; otherwise only single numbers
            and constants that are one number throughout do.
    """

    def __init__(
        self,
        parts: Parts,
        way: Region,
        followed: Followed,
        region: Region,
        evaluator: Evaluator,
        ask: Probe,
        *,
        hold: bool,
    ) -> None:
        assert parts.scores is not None and parts.weighted is not None
        self._scores, self._weighted = parts.scores, parts.weighted
        self._way, self._followed = way, followed
        self._evaluator = evaluator
        self._raw = evaluator.sizes.shape(parts.scores.node)
        numbers = torch.arange(torch.Size(self._raw).numel()).reshape(self._raw)
        self._places = parts.scores.result(numbers).reshape(-1)
        self.shape = followed.shape
        """``[N, S, T]``: of the scores that are given, and of what is returned."""
        self.targets = sorted(followed.targets, key=lambda target: len(target.shape))
        """The shapes that the scores take on the way: what a mask broadcasts against."""
        self.multiplied: torch.Tensor | None = None
        """The product of all factors of the scores. Scores are divided by it before they are sent, so that it
        cancels."""
        self.total = torch.zeros((), dtype=torch.float64)
        """What the weights of each row summed to in the last call."""
        self._added: tuple[Node, ...] = (
            () if parts.scores.added is None else (region.view.canonical(parts.scores.added),)
        )
        read = dict.fromkeys((*way.others, *self._added))
        held = {n: value for n in read if (value := _held(n, evaluator, ask, hold)) is not None}
        self.held = held
        self.nodes = tuple(n for n in read if n in region.others and n not in held)
        self.indices = tuple(region.others.index(n) for n in self.nodes)
        # q, k and v may be read for their dtype (`type_as(q)`), so they are given any value; used values would not fit
        # later.
        beside = [n for n in read if n not in region.others and n not in held]
        self._beside = {**held, **dict(zip(beside, ask.draws(beside, evaluator, 43), strict=True))}

    def __call__(self, scores: torch.Tensor, values: list[torch.Tensor]) -> torch.Tensor:
        held = {**self._beside, **dict(zip(self.nodes, values, strict=True))}
        if self.multiplied is not None:
            scores = scores / self.multiplied
        raw = torch.empty(self._places.numel(), dtype=torch.float64)
        raw[self._places] = scores.reshape(-1)
        raw = raw.reshape(self._raw)
        if self._scores.added is not None:
            raw = self._scores.alpha * raw + self._scores.beta * held[self._added[0]]
        weights = self._evaluator.region(self._way, [raw, *(held[n] for n in self._way.others)])
        weights = self._weighted.rows(weights).reshape(self.shape)[self._followed.matrices]
        self.total = weights.sum(-1)
        return weights.log()


def follow_scores(region: Region, parts: Parts, evaluator: Evaluator) -> tuple[Region, Followed] | Reason:
    """The way from the first product to the weights, and where its scores go on it."""
    assert parts.scores is not None and parts.weighted is not None
    way = between(region.view, parts.weighted.left, [parts.scores.node], lambda _: True, shared=region.others)
    if way is None:
        return Reason("softmax of a product, but the scores are changed by more than scale, soft-cap and mask", 2)
    followed = follow(way, parts.scores, parts.weighted, evaluator)
    return followed if isinstance(followed, Reason) else (way, followed)


def centred(t: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """`t` less its mean over the kept keys of each row, which softmax does not see; 0 in rows that keep nothing."""
    kept = torch.where(soft, t, 0.0)
    return torch.where(soft, kept - kept.sum(-1, keepdim=True) / soft.sum(-1, keepdim=True).clamp(min=1), 0.0)


def _held(node: Node, evaluator: Evaluator, ask: Probe, hold: bool) -> torch.Tensor | None:
    """The node's value in this program if it is to be held, else None."""
    if op_name(node) == "" and not hold and fake(node).dim() > 0:
        return None  # a buffer: its content is looked at only if nothing else explains the bias
    if not hold:
        return ask.one_number(node, evaluator) if fake(node).dtype != torch.bool else None
    if ask.depends_on_input(node):
        return None
    try:
        (value,) = ask.leaf_values([node], evaluator, 0)
    except CannotEvaluate:
        return None
    return value
