"""The attention weights as a function of the raw scores and of the tensors beside them.

Weights are read as log(weights), which is the score up to one number a row: so softmax, its shifted and its written-out
spellings all look the same from outside.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fxfuse.graph.region import Region, between
from fxfuse.graph.view import fake, op_name
from fxfuse.proof.evaluate import CannotEvaluate, Evaluator
from fxfuse.recognise.answers import Reason
from fxfuse.recognise.attention_parts import Parts
from fxfuse.recognise.questions import Questions


class Weights:
    """log(weights) as a function of the raw product and of the values of `nodes`.

    Args:
        way: from the first product to the weights that enter the second.
        hold: every tensor that no input has a part in keeps its value in this program; otherwise only single numbers
            and constants that are one number throughout do.
    """

    def __init__(
        self, parts: Parts, way: Region, region: Region, evaluator: Evaluator, ask: Questions, *, hold: bool
    ) -> None:
        assert parts.scores is not None and parts.weighted is not None
        self._scores, self._weighted = parts.scores, parts.weighted
        self._way = way
        self._evaluator = evaluator
        self._raw = evaluator.sizes.shape(parts.scores.node)
        numbers = torch.arange(torch.Size(self._raw).numel()).reshape(self._raw)
        arranged = parts.scores.result(numbers)
        self._places = arranged.reshape(-1)
        logits = parts.softmax.args[0]
        assert isinstance(logits, Node)
        of_logits = evaluator.sizes.shape(logits)
        self.shape = of_logits if torch.Size(of_logits).numel() == numbers.numel() else tuple(arranged.shape)
        """Of the scores, and of what is returned."""
        self.targets = {len(self.shape): self.shape}
        """By rank, the shapes that the scores take on the way: what a mask broadcasts against."""
        for node in (parts.scores.node, *way.nodes):
            shape = evaluator.sizes.shape(node) if isinstance(node.meta.get("val"), torch.Tensor) else ()
            if torch.Size(shape).numel() == numbers.numel() and shape[-2:] == self.shape[-2:]:
                self.targets.setdefault(len(shape), shape)
        self.total = torch.ones(self.shape[:-1], dtype=torch.float64)
        """What the weights of each row summed to in the last call."""
        self._added: tuple[Node, ...] = (
            () if parts.scores.added is None else (region.view.canonical(parts.scores.added),)
        )
        read = dict.fromkeys((*way.others, *self._added))
        held = {n: value for n in read if (value := _held(n, evaluator, ask, hold)) is not None}
        self.held = held
        self.nodes = tuple(n for n in read if n in region.others and n not in held)
        self.indices = tuple(region.others.index(n) for n in self.nodes)
        # Read for their dtype alone (`type_as(q)`); were their values used, the answers would not fit.
        beside = [n for n in read if n not in region.others and n not in held]
        self._beside = {**held, **dict(zip(beside, ask.draws(beside, evaluator, 43), strict=True))}

    def __call__(self, scores: torch.Tensor, values: list[torch.Tensor]) -> torch.Tensor:
        held = {**self._beside, **dict(zip(self.nodes, values, strict=True))}
        raw = torch.empty(self._places.numel(), dtype=torch.float64)
        raw[self._places] = scores.reshape(-1)
        raw = raw.reshape(self._raw)
        if self._scores.added is not None:
            raw = self._scores.alpha * raw + self._scores.beta * held[self._added[0]]
        weights = self._evaluator.region(self._way, [raw, *(held[n] for n in self._way.others)])
        weights = self._weighted.rows(weights).reshape(self.shape)
        self.total = weights.sum(-1)
        return weights.log()


def read_weights(
    region: Region, parts: Parts, evaluator: Evaluator, ask: Questions, *, hold: bool = False
) -> Weights | Reason:
    """The weights as a function, or why they are none of the raw scores."""
    assert parts.scores is not None and parts.weighted is not None
    way = between(region.view, parts.weighted.left, [parts.scores.node], lambda _: True)
    if way is None:
        return Reason("softmax of a product, but the scores are changed by more than scale, soft-cap and mask", 2)
    raw, weights = (torch.Size(evaluator.sizes.shape(n)).numel() for n in (parts.scores.node, parts.weighted.left))
    if raw != weights:
        return Reason("softmax attention, but its weights are not one for each score", 3)
    return Weights(parts, way, region, evaluator, ask, hold=hold)


def centred(t: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """Less its mean over the kept keys of each row, which softmax does not see; 0 where nothing is kept."""
    kept = torch.where(soft, t, 0.0)
    return torch.where(soft, kept - kept.sum(-1, keepdim=True) / soft.sum(-1, keepdim=True).clamp(min=1), 0.0)


def _held(node: Node, evaluator: Evaluator, ask: Questions, hold: bool) -> torch.Tensor | None:
    """The node's value in this program, if it is to be held."""
    if op_name(node) == "" and not hold and fake(node).dim() > 0:
        return None  # a buffer: what it holds is looked at where nothing else explains the bias
    if not hold:
        return ask.one_number(node, evaluator) if fake(node).dtype != torch.bool else None
    if ask.depends_on_input(node):
        return None
    try:
        (value,) = ask.leaf_values([node], evaluator, 0)
    except CannotEvaluate:
        return None
    return value
