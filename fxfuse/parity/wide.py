"""A captured program evaluated in a wider dtype than it was written for: what it means, without its rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node

from fxfuse.torch_seams import pytree


def wide_outputs(
    program: ExportedProgram, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> list[torch.Tensor]:
    """The outputs of `program`, every floating-point operation in float64, or in float32 if it is a 16-bit program.

    Casts between floating-point dtypes are ignored: they are rounding. Weights are widened one operation at a time,
    so that the peak is the program plus its largest weight, not the program twice or four times over.

    Args:
        program: not yet fused. Its guards on the inputs are not checked.
        args: inputs in the program's own dtypes.
        kwargs: the same by name.
    """
    module = program.module(check_guards=False)
    wide = torch.float32 if working_dtype(program) in (torch.float16, torch.bfloat16) else torch.float64
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs or {})))
    with torch.no_grad():
        outputs = _Wide(module, wide).run(*leaves)
    return tensors_of(outputs)


def tensors_of(outputs: Any) -> list[torch.Tensor]:
    """What a program returns as its ONNX graph does: a size is a tensor there, and None is left out."""
    leaves = pytree.tree_leaves(outputs)
    return [torch.tensor(leaf) if isinstance(leaf, int) else leaf for leaf in leaves if leaf is not None]


def working_dtype(program: ExportedProgram) -> torch.dtype:
    """The narrowest floating-point dtype in the graph: what a model of that dtype rounds to."""
    seen = {
        value.dtype
        for node in program.graph.nodes
        for value in pytree.tree_leaves(node.meta.get("val"))
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    return max(seen, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


class _Wide(Interpreter):
    """Runs a graph with every floating-point tensor in `dtype`, widened where it is used."""

    def __init__(self, module: GraphModule, dtype: torch.dtype) -> None:
        super().__init__(module)
        self.dtype = dtype

    def widen(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(self.dtype)
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return self.dtype
        return value

    def run_node(self, n: Node) -> Any:
        # The guards on the inputs, and asserts on dtypes that are no longer there.
        if n.op == "call_module" or n.target is torch.ops.aten._assert_tensor_metadata.default:
            return None
        return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        # The body of a higher-order operator, such as wrap_with_set_grad_enabled.
        return _Wide(value, self.dtype).run if isinstance(value, GraphModule) else value

    def call_function(self, target: Callable[..., Any] | str, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten.embedding.default:  # a row at a time: the table stays as it is
            return self.widen(super().call_function(target, args, kwargs))
        args, kwargs = pytree.tree_map(self.widen, (args, kwargs))
        return pytree.tree_map(self.widen, super().call_function(target, args, kwargs))

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        return args[0]
