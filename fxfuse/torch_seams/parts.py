"""Private attributes of torch's objects, by functions that say what they are, and what is imported only when needed."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from fxfuse.torch_seams.names import (
    DispatchKey,
    FakeTensorMode,
    HigherOrderOperator,
    OpOverload,
    ShapeEnv,
    pytree,
    torch_flex,
)

# ---- operators


def schema_of(target: object) -> Any:
    """The `FunctionSchema` of an operator's overload; None of any other function."""
    return getattr(target, "_schema", None)


def custom_name(operator: object) -> str | None:
    """``"mine::geglu"`` of what ``torch.library.custom_op`` made; None of anything else."""
    name = getattr(operator, "_qualname", None)
    return name if isinstance(name, str) else None


def overload_name(target: object) -> str:
    """``"Tensor"`` of `aten.mul.Tensor`; empty for the default overload, and for what is no operator."""
    return target._overloadname if isinstance(target, OpOverload) else ""


# ---- programs, graphs, modules


def share_codegen(graph: Graph, other: Graph) -> None:
    """`graph` is called and returns as `other` does: with the same trees of inputs and outputs."""
    graph._codegen = copy.deepcopy(other._codegen)


def plain_codegen(graph: Graph) -> None:
    """`graph` takes its placeholders and returns its outputs one by one."""
    graph._codegen = torch.fx.graph.CodeGen()


def is_erased(node: Node) -> bool:
    """Was it taken out of its graph?"""
    return node._erased


def set_graph_module(program: ExportedProgram, module: GraphModule) -> None:
    program._graph_module = module


def own_weights(program: ExportedProgram) -> None:
    """`program`, a copy that shares the dicts of its weights and constants with another, gets dicts of its own."""
    program._state_dict, program._constants = dict(program.state_dict), dict(program.constants)


def guards_code(program: ExportedProgram) -> list[str]:
    """What the program asks of its inputs, in Python; none in releases that do not write it down."""
    return list(getattr(program, "_guards_code", None) or ())


def drop_guards_code(program: ExportedProgram) -> None:
    program._guards_code = []


def drop_input_checks(module: torch.nn.Module) -> None:
    """A program as a module asks in hooks whether sizes lie in the range of their symbol."""
    module._forward_pre_hooks.clear()


def buffers_of(module: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """The module's own dict of buffers, to be written to."""
    return module._buffers


def version_of(tensor: torch.Tensor) -> int:
    """How often the tensor was written to."""
    return tensor._version


def has_autocast(mode: torch.autocast) -> bool:
    """Has this machine the mode's device?"""
    return bool(mode._enabled)


# ---- fake tensors and sizes


def fake_mode_of(values: Any) -> FakeTensorMode | None:
    """The mode of the first fake tensor among these, of whatever tree."""
    return next((v.fake_mode for v in pytree.tree_leaves(values) if hasattr(v, "fake_mode")), None)


def refusing_guards(env: ShapeEnv | None) -> AbstractContextManager[Any]:
    """Within the block a new guard on a symbolic size raises; nothing before torch 2.13, which has no such context."""
    made: AbstractContextManager[Any] = getattr(env, "error_on_new_guards", nullcontext)()
    return made


# ---- torch.func.vmap


def vmap_level() -> int:
    """How many vmaps are open in this thread."""
    return torch._C._functorch.maybe_current_level() or 0


def close_vmap() -> None:
    torch._C._functorch._vmap_decrement_nesting()


# ---- torch.export, torch.onnx


def export_trace() -> types.ModuleType:
    """The module of torch.export that prints the graph of a failed capture."""
    return import_module("torch.export._trace")


def keeps_triton_operators() -> bool:
    """Does what is traced now keep operators with Triton kernels whole? Asking imports Triton,
    which `fxfuse.kernels.interpret` must come before."""
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    return bool(custom_triton_ops_decomposition_disabled())  # type: ignore[no-untyped-call]


def recurrent_loops() -> list[Callable[[], AbstractContextManager[None]]]:
    """What torch.onnx enters to capture recurrent layers as loops, in the releases that have it."""
    try:
        from torch.export import _patches
    except ImportError:
        return []
    names = "register_lstm_while_loop_decomposition", "register_gru_while_loop_decomposition"
    return [getattr(_patches, name) for name in names if hasattr(_patches, name)]


def onnx_core() -> Any:
    """The module of torch.onnx whose functions `fxfuse.onnx.plugin` wraps.

    Raises:
        ImportError: this torch has none.
    """
    from torch.onnx._internal.exporter import _core

    return _core


def user_error() -> type[Exception]:
    """What torch.export raises where it cannot do what is asked; importing torch._dynamo takes a second."""
    from torch._dynamo.exc import UserError

    return UserError


def deregister(kind: type) -> None:
    """Instances of the class are leaves of trees again."""
    pytree._deregister_pytree_node(kind)


# ---- flex_attention


def flex_wrapper() -> types.CodeType:
    """The function in flex_attention that it compiles outside of dynamo."""
    codes = torch_flex.flex_attention.__code__.co_consts
    return next(c for c in codes if isinstance(c, types.CodeType) and c.co_name == "_flex_attention_hop_wrapper")


def forget_compiled(code: types.CodeType) -> None:
    """Dynamo forgets what it compiled of this function."""
    from torch._dynamo.eval_frame import remove_from_cache

    remove_from_cache(code)


def forget_dispatch(operator: HigherOrderOperator, key: DispatchKey) -> None:
    """The operator looks again for the kernel of this key, which was replaced."""
    operator._dispatch_cache.pop(key, None)


def below_autograd() -> AbstractContextManager[None]:
    guard: AbstractContextManager[None] = torch._C._AutoDispatchBelowAutograd()
    return guard


def at_every_position(mask_mod: Callable[..., Any], *positions: torch.Tensor) -> torch.Tensor:
    """A mask function at every batch, head, query and key, ``table[q]`` with scalar indices included."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    with TransformGetItemToIndex():
        found: torch.Tensor = torch_flex._vmap_for_bhqkv(mask_mod, prefix=())(*positions)
    return found


def sliced_mask_mod() -> Callable[..., Any]:
    """The function of a mask that was sliced: calling it raises, until it is set anew."""
    raises: Callable[..., Any] = torch_flex._sliced_mask_mod_error
    return raises


def is_mask_mod(function: Callable[..., Any]) -> bool:
    """Does the function take what a mask_mod takes, and not what a score_mod takes?"""
    return torch_flex._get_mod_type(function) == torch_flex._ModificationType.MASK_MOD
