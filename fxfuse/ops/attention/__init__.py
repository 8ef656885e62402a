"""fxfuse::attention, which is Attention of ONNX (opset 23; with nonpad_kv_seqlen, 24).

https://onnx.ai/onnx/operators/onnx__Attention.html

    attention                Y
    attention_with_present   Y, present_key, present_value
    attention_with_qk        Y, present_key, present_value, qk_matmul_output

Three operators and not one, because an ONNX node costs up to twice the time when it has to give the outputs that
nobody reads. Alignment of `is_causal`, as opset 24 corrected it: query i sees key j if j <= i + offset, with the
offset 0 without a cache, P with a past, nonpad_kv_seqlen - Sq with a cache in K and V. A query that sees no key
gives 0. A window (opset 25) counts from the same place: i + offset - left_window_size <= j, and j <= i + offset +
right_window_size; -1 is no bound.

Q                 [B, Hq, Sq, D] or, with q_num_heads, [B, Sq, Hq*D]; any floating-point type, any layout
K, V              [B, Hkv, Skv, D or Dv] or [B, Skv, Hkv*...]; Hkv divides Hq; Q's type, as all that follows
attn_mask         bool, or Q's type; broadcasts to [B, Hq, Sq, T], T = P + Skv; a shorter last dim hides the rest,
                  also if it is 1
past_key, _value  [B, Hkv, P, D or Dv]
nonpad_kv_seqlen  [B], int64; not with a past, nor where present_key is given
Y                 Q's rank: [B, Hq, Sq, Dv], in memory [B, Sq, Hq, Dv], or [B, Sq, Hq*Dv]
present_*         [B, Hkv, T, D or Dv], contiguous
qk_matmul_output  [B, Hq, Sq, T], contiguous; which stage it is says qk_matmul_output_mode

Raises FxfuseError, naming the argument: shapes, types or attributes that do not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxfuse.kernels.dispatch import Choice, kernel
from fxfuse.kernels.switch import kernels_forced
from fxfuse.ops.arguments import equal, refuse
from fxfuse.ops.attention import math as math_
from fxfuse.ops.attention.arguments import Attributes, Inputs, Sizes, check
from fxfuse.ops.attention.backward import fast_gradients
from fxfuse.ops.attention.sdpa import has_fused_kernel
from fxfuse.ops.attention.translation import make_translation
from fxfuse.ops.outputs import as_laid_out
from fxfuse.ops.registry import Takes, define_op, has_kernel

ARGUMENTS = (
    "(Tensor Q, Tensor K, Tensor V, Tensor? attn_mask=None, Tensor? past_key=None, Tensor? past_value=None, "
    "Tensor? nonpad_kv_seqlen=None, *, int is_causal=0, int kv_num_heads=0, int q_num_heads=0, "
    "int qk_matmul_output_mode=0, float? scale=None, float softcap=0.0, int? softmax_precision=None, "
    "int left_window_size=-1, int right_window_size=-1)"
)

Outputs = Tensor | tuple[Tensor | None, ...]


def composite(count: int) -> Callable[..., Outputs]:
    """The implementation that gives the first `count` outputs."""

    def run(*inputs: Tensor | None, **attributes: Any) -> Outputs:
        i, a = Inputs(*inputs), Attributes(**attributes)  # type: ignore[arg-type]
        sizes = checked(i, a, count)
        K, V = keys_and_values(i, a, sizes, fresh=count > 1)
        p = math_.problem(i, a, sizes, K, V)
        if count < 4 and math_.sdpa_computes(p, a):
            y, qk = math_.sdpa(p, a), None
        else:
            stages = math_.scores(p, a, math_.softmax_dtype(a))
            y, qk = math_.grouped_matmul(stages.weights, V), stages[a.qk_matmul_output_mode]
        y = as_laid_out(y, (0, 2, 1, 3))
        y = math_.merge_heads(y, i.Q.dim())
        return y if count == 1 else (y, K, V, qk)[:count]

    return run


def keys_and_values(i: Inputs, a: Attributes, sizes: Sizes, fresh: bool) -> tuple[Tensor, Tensor]:
    """All the keys and values; `fresh`: as outputs, contiguous tensors of their own."""
    both = []
    for past, new in ((i.past_key, i.K), (i.past_value, i.V)):
        new = math_.split_heads(new, a.kv_num_heads)
        if not fresh:
            both.append(math_.joined(past, new))
            continue
        B, H, _, size = new.shape
        out = new.new_empty((B, H, sizes.T, size))
        if past is not None:
            out[:, :, : sizes.P] = past
        out[:, :, sizes.P :] = new
        both.append(out)
    return both[0], both[1]


def checked(i: Inputs, a: Attributes, count: int) -> Sizes:
    sizes = check(i, a)
    if count > 1:
        what = "with nonpad_kv_seqlen the cache is in K and V: there is no present_key to give"
        if not (i.nonpad_kv_seqlen is None or count == 4):
            refuse(what, "nonpad_kv_seqlen")
    return sizes


def fake(count: int) -> Callable[..., Outputs]:
    """The first `count` outputs' shapes: Y lies in memory as [B, Sq, Hq, Dv], the others are contiguous."""

    def run(*inputs: Tensor | None, **attributes: Any) -> Outputs:
        i, a = Inputs(*inputs), Attributes(**attributes)  # type: ignore[arg-type]
        s = checked(i, a, count)
        three = i.Q.dim() == 3
        y = i.Q.new_empty((s.B, s.Sq, s.Hq * s.Dv)) if three else i.Q.new_empty((s.B, s.Sq, s.Hq, s.Dv)).transpose(1, 2)
        if count == 1:
            return y
        K, V = i.Q.new_empty((s.B, s.Hkv, s.T, s.D)), i.Q.new_empty((s.B, s.Hkv, s.T, s.Dv))
        return (y, K, V, i.Q.new_empty((s.B, s.Hq, s.Sq, s.T)))[:count] if count == 4 else (y, K, V)

    return run


def decomposition(count: int) -> Callable[..., Outputs]:
    """The first `count` outputs in ATen operators only, for symbolic sizes too."""

    def run(*inputs: Tensor | None, **attributes: Any) -> Outputs:
        i, a = Inputs(*inputs), Attributes(**attributes)  # type: ignore[arg-type]
        sizes = checked(i, a, count)
        K = math_.joined(i.past_key, math_.split_heads(i.K, a.kv_num_heads))
        V = math_.joined(i.past_value, math_.split_heads(i.V, a.kv_num_heads))
        p = math_.problem(i, a, sizes, K, V)
        if count < 4 and math_.sdpa_computes(p, a):
            p = p._replace(mask=math_.padded(p.mask, sizes.T))
            plain = a.is_causal and p.mask is None and i.past_key is None and p.lengths is None
            mask = None if plain else math_.combined(p, a.is_causal)
            gqa = not equal(sizes.Hq, sizes.Hkv)
            y = torch.nn.functional.scaled_dot_product_attention(
                p.Q, K, V, mask, is_causal=bool(plain), scale=a.scale, enable_gqa=gqa
            )
            qk = None
        else:
            stages = math_.scores(p, a, math_.softmax_dtype(a))
            y, qk = math_.grouped_matmul(stages.weights, V), stages[a.qk_matmul_output_mode]
        # Not contiguous(): a kernel other than the one that was traced may give other strides.
        y_BSHD = y.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        y = y_BSHD.flatten(2) if i.Q.dim() == 3 else y_BSHD.transpose(1, 2)
        if count == 1:
            return y
        present = tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in (K, V))
        return (y, *present, qk)[:count]

    return run


def setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.attributes = keyword_only_inputs
    ctx.set_materialize_grads(False)


def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Recomputes the attention weights: nothing of size Sq × T is kept between forward and backward."""
    i, a = Inputs(*ctx.saved_tensors), Attributes(**ctx.attributes)
    grad_Y, grad_present_key, grad_present_value, grad_qk = (*grads, None, None, None)[:4]
    sizes = check(i, a)
    K = math_.joined(i.past_key, math_.split_heads(i.K, a.kv_num_heads))
    V = math_.joined(i.past_value, math_.split_heads(i.V, a.kv_num_heads))
    if grad_Y is not None:
        grad_Y = math_.split_heads(grad_Y, a.q_num_heads)
    p = math_.problem(i, a, sizes, K, V)
    if grad_Y is not None and grad_qk is None and has_kernel(grad_Y):
        grad_Q, grad_K, grad_V, grad_mask = fast_gradients(p, a, grad_Y, ctx.needs_input_grad[3:4] == (True,))
    else:
        grad_Q, grad_K, grad_V, grad_mask = math_.gradients(p, a, grad_Y, grad_qk)
    if grad_present_key is not None:
        grad_K = grad_K + grad_present_key
    if grad_present_value is not None:
        grad_V = grad_V + grad_present_value

    # Shorter than the inputs where a call left the last ones out.
    need = (*ctx.needs_input_grad, *[False] * 7)
    rank, dtype, P = i.Q.dim(), i.Q.dtype, sizes.P
    out: list[Tensor | None] = [None] * 7
    if need[0]:
        out[0] = math_.merge_heads(grad_Q, rank).to(dtype)
    for new, past, grad in ((1, 4, grad_K), (2, 5, grad_V)):
        if need[new]:
            out[new] = math_.merge_heads(grad[:, :, P:], rank).to(dtype)
        if need[past]:
            out[past] = grad[:, :, :P].to(dtype)
    if need[3] and i.attn_mask is not None:
        out[3] = grad_mask[..., : i.attn_mask.shape[-1]].sum_to_size(i.attn_mask.shape).to(dtype)
    return tuple(out)


def choose(count: int, name: str) -> Choice:
    """What to call for the first `count` outputs: SDPA where it has a fused kernel, else ours."""
    ours = kernel(name)

    def chosen(*inputs: Tensor | None, **attributes: Any) -> Callable[..., Any] | str:
        i, a = Inputs(*inputs), Attributes(**attributes)  # type: ignore[arg-type]
        sizes = checked(i, a, count)
        p = math_.problem(i, a, sizes, math_.split_heads(i.K, a.kv_num_heads), math_.split_heads(i.V, a.kv_num_heads))
        if not kernels_forced() and has_fused_kernel(p, a, sizes.T):
            return composite(count)
        return ours(*inputs, **attributes)

    return chosen


TAKES: Takes = {
    "types": ["float16", "bfloat16", "float32", "float64"],
    "exact": ["float16", "bfloat16", "float32"],  # scale is a float32, and softmax too unless it is asked otherwise
    "alike": ["Q", "K", "V", "past_key", "past_value"],
    "full": "attn_mask",
    "needs": {"past_key": ["present_key", "present_value"]},
    "onnxruntime_cpu": ["float16", "float32", "float64"],
}
OPERATORS = {"attention": 1, "attention_with_present": 3, "attention_with_qk": 4}
"""How many outputs each has."""
_FUSED = [name for name in OPERATORS if name != "attention_with_qk"]
"""Those that have a kernel: none of them keeps the Sq × T scores."""

for _name, _count in OPERATORS.items():
    define_op(
        _name,
        ARGUMENTS + " -> " + ("Tensor" if _count == 1 else "(" + ", ".join(["Tensor"] * _count) + ")"),
        composite=composite(_count),
        fake=fake(_count),
        setup_context=setup_context,
        backward=backward,
        decomposition=decomposition(_count),
        onnx_name="Attention",
        since_opset=23,
        make_translation=make_translation(_count),
        analytic=True,
        takes=TAKES,
        kernels=f"{__name__}.kernels" if _name in _FUSED else None,
        choose=choose(_count, _name),
        found_by=("Attention", "KVCache") if _name == "attention_with_present" else None,
        accumulates=_name == "attention",
    )
