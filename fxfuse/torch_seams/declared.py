"""The private and version-dependent names of torch that fxfuse uses, each with the reason why no public one serves.

A new release of torch may move any of them. `moved` says which: it looks every one of them up.

>>> from fxfuse.torch_seams import moved
>>> moved()
[]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Seam:
    """One private name, or several of one module that are used for one reason."""

    name: str
    """The dotted path of a module, class or function; ``"torch.export.ExportedProgram()._guards_code"`` for an
    attribute that only objects have."""
    why: str
    """What fxfuse needs it for, and why nothing public serves."""
    members: tuple[str, ...] = ()
    """What is used of it."""
    upstream: str = ""
    """The issue or pull request of torch after which a public name may serve."""
    optional: bool = False
    """Do some of the releases that fxfuse takes lack it, and does fxfuse work without it?"""
    looked_up: Callable[[], object] | None = field(default=None, compare=False)
    """How it is found, where the path alone does not lead there; raises if it is not."""

    def missing(self) -> list[str]:
        """The names that this torch does not have, each with how the look-up failed."""
        try:
            found = _at(self.name) if self.looked_up is None else self.looked_up()
        except Exception as error:  # an import of torch's internals may raise anything
            return [f"{self.name} ({type(error).__name__}: {error})"]
        return [f"{self.name}.{member}" for member in self.members if not hasattr(found, member)]


def moved(seams: Iterable[Seam] | None = None) -> list[str]:
    """What this torch has moved: for each missing name which it is, and what fxfuse needs it for.

    Args:
        seams: those to look up; by default all of them but the optional ones. It takes a few seconds, for
            torch._dynamo is imported.
    """
    asked = [s for s in TORCH if not s.optional] if seams is None else list(seams)
    return [f"{name}: {seam.why}" for seam in asked for name in seam.missing()]


def _at(path: str) -> object:
    """The module, or what it has under this path."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        try:
            found: Any = import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the module is there, and misses another
            continue
        return functools.reduce(getattr, parts[count:], found)
    raise ModuleNotFoundError(f"no module {parts[0]!r}")


def _operator() -> Any:
    import torch

    return torch.ops.aten.mul.Tensor


@functools.lru_cache(maxsize=1)
def _program() -> Any:
    import torch

    return torch.export.export(torch.nn.Identity(), (torch.zeros(1),))


def _flex_wrapper() -> object:
    from fxfuse.torch_seams.parts import flex_wrapper

    return flex_wrapper()


_IN_GRAPHS = "a graph of torch.func.vmap holds calls of it, which are known by this name"
_FLEX = "torch.nn.attention.flex_attention"

TORCH: tuple[Seam, ...] = (
    # ---- operators and their schemas
    Seam(
        "torch._ops",
        "the types of a node's target; torch.ops holds the objects and names no type of theirs",
        ("OpOverload", "HigherOrderOperator"),
    ),
    Seam(
        "OpOverload()._schema",
        "names, types and aliases of an operator's arguments: what it writes to, and which value is which argument",
        looked_up=lambda: _operator()._schema,
    ),
    Seam(
        "OpOverload()._overloadname",
        "the same overload of the operator that does not write in place (add_.Tensor, add.Tensor)",
        looked_up=lambda: _operator()._overloadname,
    ),
    Seam(
        "torch._library.custom_ops.CustomOpDef",
        "the operator that torch.library.custom_op made of a function: a pattern's replacement, named by its namespace",
        ("_qualname",),
    ),
    # ---- trees
    Seam(
        "torch.utils._pytree",
        "torch.export flattens inputs with it; a tree that optree or a loop of ours flattened could differ",
        (
            "SUPPORTED_NODES",
            "SequenceKey",
            "TreeSpec",
            "_deregister_pytree_node",
            "keystr",
            "register_pytree_node",
            "tree_flatten",
            "tree_flatten_with_path",
            "tree_leaves",
            "tree_leaves_with_path",
            "tree_map",
            "tree_map_only",
            "tree_structure",
            "tree_unflatten",
        ),
        upstream="https://github.com/pytorch/pytorch/issues/65761, https://github.com/pytorch/pytorch/pull/175082",
    ),
    Seam(
        "torch.utils._pytree.LeafSpec",
        "copying a program copies its leaves, which makes the deprecated class and warns",
        upstream="https://github.com/pytorch/pytorch/pull/138214",
        optional=True,
    ),
    # ---- modes, fake tensors
    Seam(
        "torch.utils._python_dispatch",
        "every operator that runs is looked at, as autograd and autocast leave it",
        ("TorchDispatchMode", "_disable_current_modes"),
    ),
    Seam(
        "torch._subclasses.fake_tensor",
        "the values of a captured graph are of these types",
        ("FakeTensor", "FakeTensorMode"),
    ),
    Seam(
        "torch._subclasses.fake_tensor.FakeTensorMode.cache_enabled",
        "the cache of fake tensors guards on sizes when it makes a view (`_get_output_tensor_from_cache_entry`)",
        looked_up=lambda: _fake_mode().cache_enabled,
    ),
    Seam(
        "torch._subclasses.functional_tensor",
        "an operator with a Triton kernel is seen through by torch.compile, as those of torch.library.triton_op are",
        ("FunctionalTensor", "FunctionalTensorMode"),
    ),
    Seam(
        "torch.export._trace.custom_triton_ops_decomposition_disabled",
        "torch.export asks this for torch.library.triton_op alone; ours keep their operators in exported programs too",
    ),
    Seam("torch._guards.detect_fake_mode", "the mode of the capture that is running"),
    Seam(
        "torch.autocast()._enabled",
        "whether the device has autocast at all: it says so nowhere else",
        looked_up=lambda: _autocast()._enabled,
    ),
    # ---- symbolic sizes
    Seam(
        "torch.fx.experimental._config.backed_size_oblivious",
        "torch.onnx captures with it; without it a size of 1 in the sample is a constant of the program",
        upstream="https://github.com/pytorch/pytorch/pull/148731, https://github.com/pytorch/pytorch/pull/186485",
    ),
    Seam("torch.fx.experimental._config.patch", "sets it for a while"),
    Seam(
        "torch.fx.experimental.symbolic_shapes",
        "sizes are compared without a guard on them",
        ("ShapeEnv", "statically_known_true"),
    ),
    Seam(
        "torch.fx.experimental.symbolic_shapes.ShapeEnv.suppress_guards",
        "regions run at sizes of their own, on which the program does not depend",
    ),
    Seam(
        "torch.fx.experimental.symbolic_shapes.ShapeEnv.error_on_new_guards",
        "a replacement that would guard on a size is refused where it does; before 2.13 that shows only afterwards",
        optional=True,
    ),
    Seam(
        "torch.fx.experimental.symbolic_shapes.ShapeEnv._get_sloc",
        "a guard is noted along with the model's line, for the message that names it",
        optional=True,
    ),
    Seam("torch.utils._sympy.functions.FloorDiv", "whole division in the expressions of sizes"),
    # ---- tracing and programs
    Seam("torch.fx.experimental.proxy_tensor.make_fx", "traces replacements with the symbols of the program"),
    Seam(
        "torch.fx.Graph()._codegen",
        "a copied graph is called as the original is; the public setter keeps no pytree layout",
        looked_up=lambda: _program().graph._codegen,
    ),
    Seam(
        "torch.fx.Node()._erased",
        "was a node erased since it was noted? `graph` goes on naming its graph",
        looked_up=lambda: next(iter(_program().graph.nodes))._erased,
    ),
    Seam(
        "torch.export.ExportedProgram()._graph_module",
        "a copy of a program whose weights are shared",
        looked_up=lambda: _program()._graph_module,
    ),
    Seam(
        "torch.export.ExportedProgram()._state_dict",
        "move_to_device_pass writes into it, and the copy shares its dict",
        looked_up=lambda: (_program()._state_dict, _program()._constants),
    ),
    Seam(
        "torch.export.ExportedProgram()._guards_code",
        "a decomposition runs what the capture asked of its inputs, and its answers stay as constants",
        optional=True,
        looked_up=lambda: _program()._guards_code,
    ),
    Seam(
        "torch.nn.Module()._forward_pre_hooks",
        "a program as a module, without its questions about sizes",
        looked_up=lambda: _module()._forward_pre_hooks,
    ),
    Seam(
        "torch.nn.Module()._buffers",
        "what a forward assigns to buffers is undone",
        looked_up=lambda: _module()._buffers,
    ),
    Seam("torch.Tensor._version", "was a constant written to since it was read?"),
    # ---- torch.func.vmap in graphs
    Seam(
        "torch._C._functorch",
        _IN_GRAPHS,
        (
            "_add_batch_dim",
            "_remove_batch_dim",
            "_vmap_decrement_nesting",
            "_vmap_increment_nesting",
            "maybe_current_level",
        ),
    ),
    Seam("torch._functorch.vmap.lazy_load_decompositions", _IN_GRAPHS),
    # ---- messages
    Seam("torch._dynamo.exc.UserError", "what torch raises where dynamic_shapes asks too much, with its suggestion"),
    Seam("torch.export._trace._log_export_wrapper", "prints the graph of a capture that failed, which is caught here"),
    *(
        Seam(module, "the logger of this module tells of what fxfuse tries and answers itself")
        for module in (
            "torch._export.non_strict_utils",
            "torch._guards",
            "torch.export._trace",
            "torch.fx.experimental.symbolic_shapes",
            "torch.onnx._internal.exporter._registration",
        )
    ),
    # ---- torch.onnx
    Seam(
        "torch.onnx._internal.exporter._core",
        "fusing has to happen between capture and decomposition; torch.onnx has no hook there",
        ("_exported_program_to_onnx_program", "_prepare_exported_program_for_export", "export"),
    ),
    Seam(
        "torch.export._patches",
        "torch.onnx enters these for recurrent layers, in the releases that have them",
        ("register_gru_while_loop_decomposition", "register_lstm_while_loop_decomposition"),
        optional=True,
    ),
    # ---- flex_attention
    Seam(
        _FLEX,
        "what stands around flex_attention's operator, and is replaced while it is captured",
        (
            "_ModificationType",
            "_create_empty_block_mask",
            "_get_mod_type",
            "_sliced_mask_mod_error",
            "_validate_device",
            "_vmap_for_bhqkv",
            "noop_mask",
            "setup_compilation_env",
        ),
        upstream="https://github.com/pytorch/pytorch/issues/165948",
    ),
    Seam(
        f"{_FLEX}.flex_attention: _flex_attention_hop_wrapper",
        "what flex_attention compiles in a capture is forgotten by its code",
        looked_up=_flex_wrapper,
    ),
    Seam("torch._higher_order_ops.flex_attention.trace_flex_attention", "where the mods are traced"),
    Seam("torch._C.DispatchKey.Autograd", "flex_attention's joint graph is not traced in a capture"),
    Seam("torch._C._AutoDispatchBelowAutograd", "likewise"),
    Seam(
        "HigherOrderOperator()",
        "likewise: the table in which the replacement stands",
        ("py_kernels", "_dispatch_cache"),
        looked_up=lambda: _flex_operator(),
    ),
    Seam("torch._dynamo.eval_frame.remove_from_cache", "what a capture compiled does not serve eager calls"),
    Seam(
        "torch._dynamo._trace_wrapped_higher_order_op",
        "indexing by a scalar tensor in a mod: run, and recognised in a graph",
        ("ModIndex", "TransformGetItemToIndex"),
    ),
)


def _fake_mode() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def _autocast() -> Any:
    import torch

    return torch.autocast("cpu")


def _module() -> Any:
    import torch

    return torch.nn.Identity()


def _flex_operator() -> Any:
    import torch

    return torch.ops.higher_order.flex_attention
