"""What graphs and proofs have to know of torch's higher-order operators, which take functions as arguments.

Such an operator has no schema that says what it does to its arguments. Whoever has a pattern for one says it here, when
the pattern is imported; a higher-order operator that nobody has said anything of is not looked into.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node


@dataclass(frozen=True)
class HigherOrder:
    """One operator. Its calls compute values from their inputs, and do nothing else."""

    evaluate: Callable[[Node, Callable[[Node], Any], Any], Any]
    """Of a call, of a function that gives the value of each of its inputs, and of the
    `fxfuse.proof.evaluate.Evaluator` that asks: what the call gives."""
    analytic: bool
    """Is it analytic in the tensors that are given to it? Breaks in its functions are for its pattern to read."""


_known: dict[object, HigherOrder] = {}


def register_higher_order(target: object, operator: HigherOrder) -> None:
    """From now on calls of `target` are read as `operator` says."""
    _known[target] = operator


def higher_order(node: Node) -> HigherOrder | None:
    """What is known of the operator that this node calls; None where it is none of these."""
    return _known.get(node.target) if node.op == "call_function" else None
