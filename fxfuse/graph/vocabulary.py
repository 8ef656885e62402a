"""What kinds of operators there are, by name: the vocabulary that proposing regions walks through.

It decides where to look, never what a region means.
"""

from __future__ import annotations

LAYOUT = frozenset(
    [
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "_unsafe_view",
        "view_as",
        "reshape_as",
        "transpose",
        "swapaxes",
        "swapdims",
        "permute",
        "t",
        "mT",
        "adjoint",
        "movedim",
        "moveaxis",
        "unsqueeze",
        "squeeze",
        "expand",
        "expand_as",
        "broadcast_to",
        "clone",
        "contiguous",
        "alias",
        "detach",
        "lift_fresh_copy",
        "select",
        "slice",
        "narrow",
        "split",
        "split_with_sizes",
        "chunk",
        "tensor_split",
        "unbind",
        "unsafe_split",
        "unsafe_chunk",
        "cat",
        "concat",
        "concatenate",
        "stack",
        "hstack",
        "repeat",
        "repeat_interleave",
        "tile",
        "index_select",
        "index",
        "take_along_dim",
        "gather",
        "flip",
        "roll",
        "view_as_complex",
        "view_as_real",
        "real",
        "imag",
        "getitem",
        "numpy_T",
        "T",
        "copy",
        "slice_scatter",
        "select_scatter",
        "diagonal_scatter",
    ]
)
"""Operators that only move elements."""
SCATTERS = frozenset(["slice_scatter", "select_scatter", "diagonal_scatter"])
"""Operators that give a tensor with a part of it replaced by another: what a write in place is read as."""
UNSET = frozenset(["empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"])
"""Tensors that hold nothing until they are written to."""
BLANK = UNSET | frozenset(["zeros", "zeros_like", "new_zeros"])
"""What is made to be written to: it depends on nothing, and belongs to the region that writes to it."""
CAST = frozenset(["to", "_to_copy", "type_as", "float", "half", "bfloat16", "double"])
NO_OP = frozenset(["dropout", "feature_dropout", "native_dropout", "alpha_dropout", "identity"])
"""Operators that are random in training and give their input back in evaluation. A region may hold them only as the
latter."""
ALIASES = frozenset(["getitem", "reshape", "flatten", "contiguous", "to", "type_as"]) | NO_OP
"""Operators that may return a view of their input although their schema does not say so."""
ARITHMETIC = frozenset(
    [
        "mul",
        "add",
        "sub",
        "rsub",
        "neg",
        "negative",
        "div",
        "true_divide",
        "addcmul",
        "complex",
        "polar",
        "conj",
        "_conj",
    ]
)
ROOTS = frozenset(
    [
        "pow",
        "square",
        "abs",
        "rsqrt",
        "sqrt",
        "reciprocal",
        "mean",
        "sum",
        "rms_norm",
        "linalg_vector_norm",
        "norm",
        "einsum",
        "linalg_vecdot",
        "matmul",
        "bmm",
        "clamp",
        "clamp_min",
        "maximum",
        "ones_like",
        "full_like",
    ]
)
"""What a norm may be written with beside arithmetic. A clamp is walked through too, so that a norm with a bound can be
reported as a near miss: ONNX's operators have no bound."""
CONTRACTION = frozenset(["matmul", "bmm", "mm", "einsum", "baddbmm", "linear"])
ASSERTIONS = frozenset(["_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size"])
