"""What a call of flex_attention computes: PyTorch's own, whose mods are written for scalars."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from fxfuse.graph.higher_order import HigherOrder
from fxfuse.patterns.flex_attention.calls import flex
from fxfuse.proof.evaluate import MAX_ELEMENTS, CannotEvaluate, Evaluator


def evaluate(node: Node, value_of: Callable[[Node], Any], evaluator: Evaluator) -> Any:
    """The call's three results, of the block mask its function alone.

    Args:
        value_of: the value of a node that the call reads.

    Raises:
        CannotEvaluate: the scores are too many, or a mod cannot run at these sizes.
    """
    call = flex(node)
    if call is None:
        raise CannotEvaluate(f"{node.name} is called in a way that is not known")
    query, key, value = (evaluator.put_off(value_of(n)) for n in (call.query, call.key, call.value))
    if math.prod(query.shape[:3]) * key.shape[2] > MAX_ELEMENTS:
        raise CannotEvaluate(f"the scores of {node.name} are too large to evaluate")
    lists = (None,) * len(call.block_mask)
    score_buffers, mask_buffers = (
        tuple(evaluator.retype(map_arg(b, value_of))) for b in (call.score_buffers, call.mask_buffers)
    )
    try:
        found = torch.ops.higher_order.flex_attention(
            query,
            key,
            value,
            evaluator.function(call.score_mod),
            (*lists, evaluator.function(call.mask_mod)),
            call.scale,
            {},
            score_buffers,
            mask_buffers,
        )
    except Exception as error:
        raise CannotEvaluate(f"{node.name} cannot run at the probed sizes: {error}") from error
    return evaluator.put_off(found)


FLEX = HigherOrder(evaluate, analytic=True)
