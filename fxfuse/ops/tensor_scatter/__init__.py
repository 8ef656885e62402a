"""fxfuse::tensor_scatter, which is TensorScatter of ONNX (opset 24): new keys or values written into a cache.

https://onnx.ai/onnx/operators/onnx__TensorScatter.html

    present = past;  present[b, .., write_indices[b] + s, ..] = update[b, .., s, ..]     (circular: modulo the length)

past_cache     [B, ..., T, ...], T being dimension `axis`; any type and layout; it is not written to
update         [B, ..., S, ...] with S <= T, the same type
write_indices  [B], int64; zeros if left out
present        past_cache's shape and type, contiguous

Raises FxfuseError, naming the argument: shapes or types that do not fit, and (where looking is cheap: on CPU) a linear
write that runs out of the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxfuse.ops.arguments import differ, exceeds, refuse, show
from fxfuse.ops.outputs import one_node
from fxfuse.ops.registry import define_op

SCHEMA = "(Tensor past_cache, Tensor update, Tensor? write_indices=None, *, int axis=-2, str mode='linear') -> Tensor"
DEFAULTS = {"axis": -2, "mode": "linear"}


def check(past_cache: Tensor, update: Tensor, write_indices: Tensor | None, axis: int, mode: str) -> int:
    """The sequence dimension, counted from the front; raises FxfuseError on arguments that do not fit."""
    rank = past_cache.dim()
    if mode not in ("linear", "circular"):
        refuse(f"mode must be linear or circular, it is {mode!r}", "mode")
    in_range = -rank <= axis < rank and axis % rank != 0
    if not in_range:
        refuse(f"axis {axis} is no sequence dimension of past_cache {show(past_cache)}", "axis")
    axis %= rank
    if update.dtype != past_cache.dtype:
        refuse(f"update is {update.dtype}, past_cache {past_cache.dtype}", "update")
    fits = update.dim() == rank and not any(
        differ(update.shape[d], past_cache.shape[d]) for d in range(rank) if d != axis
    )
    sizes = f"update {show(update)}, past_cache {show(past_cache)}"
    if not fits:
        refuse(f"{sizes}: they may differ in dimension {axis} only", "update")
    S, T = update.shape[axis], past_cache.shape[axis]
    if exceeds(S, T):
        refuse(f"{sizes}: it is longer than the cache", "update")
    if write_indices is not None:
        if write_indices.dtype != torch.int64:
            refuse("write_indices must be int64", "write_indices")
        fits = write_indices.dim() == 1 and not differ(write_indices.shape[0], past_cache.shape[0])
        if not fits:
            refuse(f"write_indices must be [{past_cache.shape[0]}], it is {show(write_indices)}", "write_indices")
    return axis


def slots(
    past_cache: Tensor, update: Tensor, write_indices: Tensor | None, axis: int, mode: str
) -> tuple[Tensor, Tensor]:
    """Where `update` goes: the index of the batch [B, 1], and of the sequence [B, S] (or [1, S])."""
    batch = torch.arange(past_cache.shape[0], device=past_cache.device).unsqueeze(1)
    position = torch.arange(update.shape[axis], device=past_cache.device).unsqueeze(0)
    if write_indices is not None:
        position = position + write_indices.unsqueeze(1)
    return batch, position % past_cache.shape[axis] if mode == "circular" else position


def composite(
    past_cache: Tensor, update: Tensor, write_indices: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    axis = check(past_cache, update, write_indices, axis, mode)
    out = past_cache.clone(memory_format=torch.contiguous_format)
    S, T = update.shape[axis], past_cache.shape[axis]
    if S == 0 or out.numel() == 0:
        return out
    if write_indices is None:
        out.narrow(axis, 0, S).copy_(update)
        return out
    if mode == "linear" and write_indices.device.type == "cpu":
        low, high = write_indices.aminmax()
        fits = low.item() >= 0 and high.item() + S <= T
        what = f"{S} entries at {write_indices.tolist()} do not fit a cache of {T}"
        if not fits:
            refuse(what, "write_indices", "use mode='circular' for a cache that wraps around")
    index = slots(past_cache, update, write_indices, axis, mode)
    out.movedim(axis, 1).index_put_(index, update.movedim(axis, 1))
    return out


def fake(
    past_cache: Tensor, update: Tensor, write_indices: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    check(past_cache, update, write_indices, axis, mode)
    return torch.empty(past_cache.shape, dtype=past_cache.dtype, device=past_cache.device)


def decomposition(
    past_cache: Tensor, update: Tensor, write_indices: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    """The cache after the write, in ATen operators only."""
    axis = check(past_cache, update, write_indices, axis, mode)
    index = slots(past_cache, update, write_indices, axis, mode)
    present = past_cache.movedim(axis, 1).index_put(index, update.movedim(axis, 1))
    return present.movedim(1, axis).contiguous()


def setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    _, update, write_indices = inputs
    ctx.save_for_backward(write_indices)
    ctx.update_shape = update.shape
    ctx.attributes = keyword_only_inputs


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    (write_indices,) = ctx.saved_tensors
    zeros = grad.new_zeros(ctx.update_shape)
    grad_past = grad_update = None
    if ctx.needs_input_grad[0]:
        grad_past = torch.ops.fxfuse.tensor_scatter(grad, zeros, write_indices, **ctx.attributes)
    if ctx.needs_input_grad[1]:
        axis = ctx.attributes["axis"] % grad.dim()
        batch, position = slots(grad, zeros, write_indices, axis, ctx.attributes["mode"])
        grad_update = grad.movedim(axis, 1)[batch, position].movedim(1, axis)
    return grad_past, grad_update, None


def make_translation(opset: int) -> Any:
    from onnxscript.onnx_opset import opset24 as op

    def tensor_scatter(
        past_cache: Any, update: Any, write_indices: Any = None, *, axis: int = -2, mode: str = "linear"
    ) -> Any:
        inputs = (past_cache, update, write_indices)
        return one_node(op.TensorScatter, inputs, {"axis": axis, "mode": mode}, DEFAULTS)

    return tensor_scatter


define_op(
    "tensor_scatter",
    SCHEMA,
    composite=composite,
    fake=fake,
    setup_context=setup_context,
    backward=backward,
    decomposition=decomposition,
    onnx_name="TensorScatter",
    since_opset=24,
    make_translation=make_translation,
    analytic=True,
    takes={
        "types": ["float16", "bfloat16", "float32", "float64"],
        "alike": ["past_cache", "update"],
        "onnxruntime_cpu": ["float16", "bfloat16", "float32", "float64"],
    },
    kernels=f"{__name__}.kernels",
)
