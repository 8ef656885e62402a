"""Which operators are analytic, so that two of their compositions that agree on an open set agree everywhere.

The list is short and written out; everything that is not on it is a break (`fxfuse.proof.breaks`). Quotients,
logarithms and roots are analytic on either side of where their argument vanishes: draws of both signs and of every
magnitude meet each side.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from fxfuse.graph.higher_order import higher_order
from fxfuse.graph.view import LAYOUT, op_name
from fxfuse.ops.registry import ACCUMULATING, ANALYTIC
from fxfuse.torch_seams import schema_of

MOVED = (LAYOUT - {"index", "gather", "take_along_dim", "index_select"}) | frozenset(
    ["getitem", "expand_as", "flatten", "unflatten", "pad", "constant_pad_nd", "movedim", "view_as", "reshape_as"]
)
"""Operators that only move elements, to places that follow from the shapes alone. Those that pick by an index tensor
are breaks (`fxfuse.proof.breaks`), for what they pick depends on values."""
_SMOOTH = frozenset(
    [
        "add",
        "sub",
        "subtract",
        "rsub",
        "mul",
        "multiply",
        "div",
        "true_divide",
        "divide",
        "neg",
        "negative",
        "addcmul",
        "addcdiv",
        "lerp",
        "reciprocal",
        "square",
        "sqrt",
        "rsqrt",
        "exp",
        "exp2",
        "expm1",
        "log",
        "log2",
        "log10",
        "log1p",
        "sin",
        "cos",
        "tan",
        "sinh",
        "cosh",
        "tanh",
        "asin",
        "acos",
        "atan",
        "asinh",
        "acosh",
        "atanh",
        "arctan",
        "erf",
        "erfc",
        "erfinv",
        "sigmoid",
        "log_sigmoid",
        "silu",
        "gelu",
        "mish",
        "polar",
        "complex",
        "conj",
        "_conj",
        "resolve_conj",
        "sinc",
        "logit",
        "xlogy",
        "logaddexp",
        "sum",
        "mean",
        "var",
        "std",
        "var_mean",
        "prod",
        "cumsum",
        "logsumexp",
        "softmax",
        "_softmax",
        "log_softmax",
        "_log_softmax",
        "_safe_softmax",
        "matmul",
        "bmm",
        "mm",
        "mv",
        "addmm",
        "baddbmm",
        "addbmm",
        "linear",
        "einsum",
        "dot",
        "outer",
        "linalg_vecdot",
        "inner",
        "layer_norm",
        "native_layer_norm",
        "rms_norm",
        "_fused_rms_norm",
        "group_norm",
        "native_group_norm",
        "batch_norm",
        "conv1d",
        "conv2d",
        "conv3d",
        "convolution",
        "scaled_dot_product_attention",
        "dequantize_affine",
        "dequantize_per_tensor",
        "dequantize_per_channel",
        "dequantize_per_channel_group",
        "full",
        "zeros",
        "ones",
        "full_like",
        "zeros_like",
        "ones_like",
        "new_full",
        "new_zeros",
        "new_ones",
        "scalar_tensor",
        "empty",
        "empty_like",
        "empty_strided",
        "empty_permuted",
        "new_empty",
        "new_empty_strided",
        "fill",
        "zero",
        "arange",
        "eye",
        "dropout",
        "feature_dropout",
        "native_dropout",
        "alpha_dropout",
        "identity",
        "real",
        "imag",
        "view_as_complex",
        "view_as_real",
        "tril",
        "triu",
        "diagonal",
    ]
)
ACCUMULATES = frozenset(
    [
        "sum",
        "mean",
        "var",
        "std",
        "var_mean",
        "cumsum",
        "logsumexp",
        "matmul",
        "bmm",
        "mm",
        "mv",
        "addmm",
        "baddbmm",
        "addbmm",
        "linear",
        "einsum",
        "dot",
        "linalg_vecdot",
        "inner",
        "layer_norm",
        "native_layer_norm",
        "rms_norm",
        "group_norm",
        "conv1d",
        "conv2d",
        "conv3d",
        "convolution",
        "scaled_dot_product_attention",
        "norm",
        "linalg_vector_norm",
        "addcmul",
    ]
) | frozenset(ACCUMULATING)
"""Operators that add up within one call. What their sums lose to rounding shows only if their operands are put a little
off: nothing of the sum can be put off from outside."""
_NORMS = frozenset(["norm", "linalg_vector_norm", "linalg_norm"])
_EXTREMES = frozenset(["amax", "amin"])
"""Operators that take the largest or smallest along an axis. They treat all elements of it alike, so that a draw in
which one of them is the largest stands for all the others."""


def is_analytic(node: Node) -> bool:
    """Does the call compute an analytic function of what flows through it?"""
    if (known := higher_order(node)) is not None:
        return known.analytic
    schema = schema_of(node.target)
    return analytic_call(op_name(node), schema, node.args, node.kwargs)


def analytic_call(name: str, schema: Any, args: Any, kwargs: Any) -> bool:
    """The same for a call with its arguments, in the graph or running."""

    def given(argument: str) -> Any:
        for place, declared in enumerate(schema.arguments if schema is not None else ()):
            if declared.name == argument:
                if argument in kwargs:
                    return kwargs[argument]
                if place < len(args) and not declared.kwarg_only:
                    return args[place]
                return declared.default_value if declared.has_default_value() else None
        return None

    if schema is not None and schema.name in ANALYTIC:
        return True
    if name in MOVED or name in _SMOOTH or name in _EXTREMES:
        return given("rounding_mode") is None if name in ("div", "divide") else True
    if name == "pow":
        return isinstance(given("exponent"), (int, float))
    if name in ("max", "min"):
        return len(args) == 1 or isinstance(args[1], int)
    if name in _NORMS:
        order = given("ord") if name == "linalg_vector_norm" else given("p")
        return order in (None, 2, 2.0, "fro")
    return False
