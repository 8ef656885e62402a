"""The names themselves, as far as importing them costs nothing that `import torch` has not paid for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch.nn.attention.flex_attention as torch_flex
from torch._C import DispatchKey
from torch._guards import detect_fake_mode
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._sympy.functions import FloorDiv

flex_operator_module: Any = import_module("torch._higher_order_ops.flex_attention")
"""Imported by name: in the package a function of this name hides the module."""

CAPTURE_LOGGERS = (
    "torch.export._trace",
    "torch._export.non_strict_utils",
    "torch._guards",
    "torch._subclasses.fake_tensor",
)
"""They tell of a capture that fails."""
IDLE_LOGGERS = (
    "torch.onnx._internal.exporter._registration",
    "torch.fx.experimental.symbolic_shapes",
    "torch._export.non_strict_utils",
)
"""They tell of what nobody can do anything about; see `fxfuse.quiet`."""
FAKE_LOGGERS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")
"""They tell of calls that do not run on fake tensors."""

GUARDS_LINE = "_get_sloc"
"""The method of `ShapeEnv` that notes where a guard comes from."""
ADD_BATCH_DIM, REMOVE_BATCH_DIM = "_add_batch_dim", "_remove_batch_dim"
VMAP_OPENS, VMAP_CLOSES = "_vmap_increment_nesting", "_vmap_decrement_nesting"
VMAP_PREPARES = "lazy_load_decompositions"
"""What vmap calls before it opens a bracket."""
FLEX_VALIDATE_DEVICE, FLEX_EMPTY_MASK = "_validate_device", "_create_empty_block_mask"
"""Functions of `torch_flex` that are replaced while flex_attention is captured."""
MOD_INDEX = "torch._dynamo._trace_wrapped_higher_order_op.ModIndex"
"""How a graph names ``table[index]`` in a mod of flex_attention."""

ONNX_CORE = "torch.onnx._internal.exporter._core"
ONNX_PREPARE, ONNX_TRANSLATE = "_prepare_exported_program_for_export", "_exported_program_to_onnx_program"
"""The module of torch.onnx that takes an export through its steps, and two of these."""

__all__ = [
    "ADD_BATCH_DIM",
    "CAPTURE_LOGGERS",
    "FAKE_LOGGERS",
    "FLEX_EMPTY_MASK",
    "FLEX_VALIDATE_DEVICE",
    "GUARDS_LINE",
    "IDLE_LOGGERS",
    "MOD_INDEX",
    "ONNX_CORE",
    "ONNX_PREPARE",
    "ONNX_TRANSLATE",
    "REMOVE_BATCH_DIM",
    "VMAP_CLOSES",
    "VMAP_OPENS",
    "VMAP_PREPARES",
    "DispatchKey",
    "FakeTensor",
    "FakeTensorMode",
    "FloorDiv",
    "FunctionalTensor",
    "FunctionalTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "ShapeEnv",
    "TorchDispatchMode",
    "detect_fake_mode",
    "flex_operator_module",
    "make_fx",
    "pytree",
    "statically_known_true",
    "torch_flex",
    "without_modes",
]
