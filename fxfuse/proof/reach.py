"""Which pieces of a break no input can reach. Each is told by a named rule, and the report says which."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from fxfuse.graph.view import CAST, argument, fake, op_name
from fxfuse.proof.breaks import Break
from fxfuse.proof.pieces import exact_below
from fxfuse.proof.positions.whole import bounds, of_type

FINITE = "inputs are finite, and what is computed of them does not overflow"


_FINITE_ASKED = frozenset(["isnan", "isinf", "isposinf", "isneginf"])
_EITHER = frozenset(["logical_or", "bitwise_or", "__or__", "any"])


def _asks_whether_finite(condition: Any) -> bool:
    """Is the condition that something is infinite or not a number?"""
    if not isinstance(condition, Node):
        return False
    if op_name(condition) in _EITHER:
        return all(_asks_whether_finite(i) for i in condition.all_input_nodes)
    return op_name(condition) in _FINITE_ASKED


def unreachable(one: Break, piece: str) -> str | None:
    """Why a piece that never ran cannot run, by a named rule; None where no rule says so."""
    condition = {"where": 0, "masked_fill": 1}.get(one.what) if piece == "true" and one.node is not None else None
    if condition is not None and one.node is not None and _asks_whether_finite(one.node.args[condition]):
        return FINITE
    if one.what in ("isnan", "isinf", "isposinf", "isneginf") and piece == "true":
        return FINITE
    if one.what == "isfinite" and piece == "false":
        return FINITE
    if one.what == "nan_to_num":
        return FINITE
    if one.what in CAST and piece in ("rounded", "wrapped") and one.node is not None:
        return _held(one.node)
    if one.what in _BOUNDED and piece in ("below", "negative") and one.node is not None:
        low = 0.0 if piece == "negative" else _lower_bound(one.node)
        if isinstance(low, (int, float)) and low <= 0 and never_negative(one.node.args[0]):
            return NOT_NEGATIVE
    return None


def _held(cast: Node) -> str | None:
    """The reason, where every value that the operand can have fits into the type of the cast."""
    found, kind = bounds(cast.args[0]), fake(cast).dtype
    if found is None:
        return None
    low, high = (-exact_below(kind), exact_below(kind)) if kind.is_floating_point else of_type(kind)
    return f"it is never below {found[0]} nor above {found[1]}" if low <= found[0] and found[1] <= high else None


NOT_NEGATIVE = "it bounds what is never below 0: squares, exponentials, sums and means of such"
_BOUNDED = frozenset(["clamp", "clamp_min", "relu", "abs", "clip", "leaky_relu"])
_NEVER_NEGATIVE = frozenset(
    [
        "square",
        "exp",
        "exp2",
        "sigmoid",
        "softmax",
        "relu",
        "abs",
        "sqrt",
        "norm",
        "linalg_vector_norm",
        "relu6",
        "softplus",
    ]
)
_OF_SUCH = frozenset(
    ["sum", "mean", "add", "mul", "div", "amax", "amin", "to", "view", "reshape", "unsqueeze", "squeeze", "expand",
     "transpose", "clone", "contiguous", "cumsum", "clamp_max"]
)  # fmt: skip


def _lower_bound(node: Node) -> Any:
    return argument(node, "min")


def never_negative(value: Any, depth: int = 8) -> bool:
    """Do the operators that compute it make sure that it is not negative: a square, an exp, an abs?"""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value >= 0
    if not isinstance(value, Node) or depth == 0:
        return False
    name = op_name(value)
    if name in _NEVER_NEGATIVE:
        return True
    if name == "pow":
        power = argument(value, "exponent")
        return (isinstance(power, int) and power % 2 == 0) or never_negative(value.args[0], depth - 1)
    if name == "mul" and value.args[0] is value.args[1]:
        return True
    if name in _OF_SUCH:
        operands = value.args[:2] if name in ("add", "mul", "div") else value.args[:1]
        return all(never_negative(o, depth - 1) for o in operands)
    return False
