"""Calls of the operators that between them use every input, attribute, rank and layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fxfuse.ops

B, HQ, HKV, SQ, SKV, P, D, DV = 2, 4, 2, 3, 5, 2, 8, 6
ops = torch.ops.fxfuse


class Sample(NamedTuple):
    name: str
    op: Any
    args: tuple[Tensor | None, ...]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.op.name().removeprefix('fxfuse::')}-{self.name}"

    def outputs(self, *args: Tensor | None) -> tuple[Tensor, ...]:
        out = self.op(*(args or self.args), **self.kwargs)
        return (out,) if isinstance(out, Tensor) else tuple(out)

    def cast(self, dtype: torch.dtype) -> Sample:
        """The same in another floating-point type; the normalisation goes along."""
        args = tuple(a.to(dtype) if a is not None and a.is_floating_point() else a for a in self.args)
        stash = {torch.float64: 11}.get(dtype, 1)
        kwargs = {**self.kwargs, "stash_type": stash} if "stash_type" in str(self.op._schema) else self.kwargs
        return self._replace(args=args, kwargs=kwargs)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def transposed(*shape: int) -> Tensor:
    """[B, H, S, D] as models have it: a transposed [B, S, H, D]."""
    shape = (shape[0], shape[2], shape[1], shape[3])
    return rand(*shape).transpose(1, 2)


def strided(*shape: int) -> Tensor:
    """Every second element of a larger tensor's last dim."""
    return rand(*shape[:-1], shape[-1] * 2)[..., ::2]


GENERATOR = torch.Generator().manual_seed(0)


def rms_norm() -> Iterator[Sample]:
    def sample(name: str, X: Tensor, scale: Tensor, **kwargs: Any) -> Sample:
        return Sample(name, ops.rms_norm.default, (X, scale), kwargs)

    yield sample("plain", rand(B, SQ, D), rand(D))
    yield sample("transposed", transposed(B, HQ, SQ, D), rand(D), epsilon=1e-2)
    yield sample("strided", strided(B, SQ, D), strided(D))
    yield sample("axis", rand(B, SQ, D), rand(SQ, D), axis=1)
    yield sample("axis_0_scalar_scale", rand(SQ, D), rand(1)[0], axis=0)
    yield sample("scale_broadcasts", rand(B, SQ, D), rand(SQ, 1))
    yield sample("one_row", rand(1, 1, D), rand(D))
    yield sample("mixed", rand(B, SQ, D).bfloat16(), rand(D))
    yield sample("half_stash", rand(B, SQ, D), rand(D), stash_type=16)
    yield sample("double_stash", rand(B, SQ, D), rand(D).half(), stash_type=11)


def layer_norm() -> Iterator[Sample]:
    def sample(name: str, X: Tensor, scale: Tensor, *bias: Tensor, **kwargs: Any) -> Sample:
        return Sample(name, ops.layer_norm.default, (X, scale, *bias), kwargs)

    yield sample("plain", rand(B, SQ, D), rand(D), rand(D))
    yield sample("no_bias", rand(B, SQ, D), rand(D))
    yield sample("transposed", transposed(B, HQ, SQ, D), strided(D), rand(D), epsilon=1e-2)
    yield sample("strided", strided(B, SQ, D), rand(D), strided(D))
    yield sample("axis", rand(B, SQ, D), rand(SQ, D), rand(SQ, D), axis=1)
    yield sample("axis_0", rand(SQ, D), rand(SQ, D), rand(SQ, D), axis=0)
    yield sample("one_row", rand(1, 1, D), rand(D), rand(D))
    yield sample("half_stash", rand(B, SQ, D), rand(D), rand(D), stash_type=16)


def rotary_embedding() -> Iterator[Sample]:
    def sample(name: str, X: Tensor, cos: Tensor, ids: Tensor | None, **kwargs: Any) -> Sample:
        args = (X, cos, rand(*cos.shape)) if ids is None else (X, cos, rand(*cos.shape), ids)
        return Sample(name, ops.rotary_embedding.default, args, kwargs)

    ids = torch.tensor([[1, 2, 3], [4, 4, 0]])
    yield sample("4d", transposed(B, HQ, SQ, D), rand(B, SQ, D // 2), None)
    yield sample("4d_ids", rand(B, HQ, SQ, D), rand(7, D // 2), ids)
    yield sample("3d", rand(B, SQ, HQ * D), rand(B, SQ, D // 2), None, num_heads=HQ)
    yield sample("3d_ids_interleaved", rand(B, SQ, HQ * D), rand(7, D // 2), ids, num_heads=HQ, interleaved=1)
    yield sample("partial", rand(B, HQ, SQ, D), rand(B, SQ, 2), None, rotary_embedding_dim=4)
    yield sample("partial_3d", strided(B, SQ, HQ * D), strided(7, 2), ids, num_heads=HQ, rotary_embedding_dim=4)
    yield sample("partial_interleaved", rand(B, HQ, SQ, D), rand(7, 2), ids, rotary_embedding_dim=4, interleaved=1)
    yield sample("expanded_cache", rand(B, HQ, SQ, D), rand(1, SQ, D // 2).expand(B, -1, -1), None, interleaved=1)


def attention() -> Iterator[Sample]:
    def sample(name: str, op: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None, **kwargs: Any) -> Sample:
        return Sample(name, op.default, (q, k, v, *rest), kwargs)

    def qkv(kv: int = SKV, dv: int = D) -> tuple[Tensor, Tensor, Tensor]:
        return transposed(B, HQ, SQ, D), rand(B, HKV, kv, D), transposed(B, HKV, kv, dv)

    def flat(kv: int = SKV, dv: int = D) -> tuple[Tensor, Tensor, Tensor]:
        return rand(B, SQ, HQ * D), rand(B, kv, HKV * D), strided(B, kv, HKV * dv)

    def past(dv: int = D) -> tuple[Tensor, Tensor]:
        return rand(B, HKV, P, D), rand(B, HKV, P, dv)

    def some(*shape: int) -> Tensor:
        """A bool mask; its first row hides everything."""
        mask = torch.rand(shape, generator=GENERATOR) > 0.4
        mask.view(-1, shape[-1])[0] = False
        return mask

    heads = {"q_num_heads": HQ, "kv_num_heads": HKV}
    one, present, qk = ops.attention, ops.attention_with_present, ops.attention_with_qk
    T = P + SKV
    yield sample("gqa", one, *qkv())
    yield sample("mha", one, rand(B, HQ, SQ, D), rand(B, HQ, SKV, D), rand(B, HQ, SKV, D), scale=0.3)
    yield sample("values_of_another_size", one, *qkv(dv=DV), is_causal=1)
    yield sample("causal_square", one, *qkv(kv=SQ), is_causal=1)
    yield sample("causal_more_keys", one, *qkv(), is_causal=1)
    yield sample("causal_fewer_keys", one, *qkv(kv=2), is_causal=1)
    yield sample("mask_2d", one, *qkv(), some(SQ, SKV))
    yield sample("mask_3d_causal", one, *qkv(), some(HQ, SQ, SKV), is_causal=1)
    yield sample("mask_4d", one, *qkv(), some(B, 1, SQ, SKV))
    yield sample("mask_short", one, *qkv(), some(SQ, 3))
    yield sample("mask_one_column", one, *qkv(), torch.ones(SQ, 1, dtype=torch.bool), is_causal=1)
    yield sample("bias", one, *qkv(), rand(B, HQ, SQ, SKV))
    yield sample("bias_causal", one, *qkv(), strided(1, HQ, SQ, SKV), is_causal=1)
    yield sample("bias_short", one, *qkv(), rand(HQ, 1, 4))
    yield sample("softcap_bias", one, *qkv(), rand(SQ, SKV), softcap=2.0, is_causal=1)
    yield sample("softmax_in_double", one, *qkv(), some(SQ, SKV), softmax_precision=11)
    yield sample("3d", one, *flat(dv=DV), **heads, is_causal=1)
    yield sample("3d_mask", one, *flat(), some(SQ, SKV), **heads, scale=0.2)
    lengths = torch.tensor([4, 2])
    yield sample("lengths", one, *qkv(), None, None, None, lengths)
    yield sample("lengths_causal", one, *qkv(), None, None, None, lengths, is_causal=1)
    yield sample("lengths_all_one", one, *qkv(), None, None, None, torch.tensor([4, 4]), is_causal=1)
    yield sample("lengths_zero", one, *qkv(), None, None, None, torch.tensor([0, 0]), is_causal=1)
    yield sample("lengths_mask", one, *qkv(), some(SQ, 4), None, None, lengths, is_causal=1, softcap=3.0)
    yield sample("past", one, *qkv(), None, *past())
    yield sample("past_causal", one, *qkv(), None, *past(), is_causal=1)
    yield sample("past_bias", one, *flat(), rand(1, 1, SQ, T), *past(), is_causal=1, **heads)
    yield sample("empty_past", one, *qkv(), None, rand(B, HKV, 0, D), rand(B, HKV, 0, D), is_causal=1)
    q, k, v = rand(B, HQ, 1, D), rand(B, HKV, 1, D), rand(B, HKV, 1, D)
    yield sample("decode", one, q, k, v, None, *past(), is_causal=1)
    yield sample("decode_mask", one, q, k, v, some(B, 1, 1, P + 1), *past())
    yield sample("decode_head_bias", one, q, k, v, rand(B, HQ, 1, P + 1), *past(), is_causal=1)
    yield sample("decode_lengths", one, q, *qkv()[1:], None, None, None, lengths, is_causal=1)
    yield sample("plain", present, *qkv())
    yield sample("past", present, *qkv(dv=DV), None, *past(DV), is_causal=1)
    yield sample("3d_past", present, *flat(), some(SQ, T), *past(), **heads)
    for mode in range(4):
        yield sample(f"mode_{mode}", qk, *qkv(), rand(SQ, SKV), qk_matmul_output_mode=mode, is_causal=1)
    yield sample("softcap", qk, *flat(), some(B, 1, SQ, T), *past(), **heads, softcap=2.0, qk_matmul_output_mode=1)


def tensor_scatter() -> Iterator[Sample]:
    def sample(name: str, cache: Tensor, update: Tensor, *rest: Tensor, **kwargs: Any) -> Sample:
        return Sample(name, ops.tensor_scatter.default, (cache, update, *rest), kwargs)

    yield sample("start", rand(B, HKV, 7, D), transposed(B, HKV, SQ, D))
    yield sample("linear", transposed(B, HKV, 7, D), rand(B, HKV, SQ, D), torch.tensor([4, 1]))
    yield sample("circular", rand(B, HKV, 7, D), rand(B, HKV, SQ, D), torch.tensor([6, 12]), mode="circular")
    yield sample("axis", rand(B, 7, HKV, D), strided(B, SQ, HKV, D), torch.tensor([0, 3]), axis=1)
    yield sample("3d_whole", rand(B, SQ, D), rand(B, SQ, D), torch.tensor([2, 1]), mode="circular")
    yield sample("last_axis", rand(B, D, 7), rand(B, D, 1), torch.tensor([6, 0]), axis=-1)


def dequantize_linear() -> Iterator[Sample]:
    def sample(name: str, x: Tensor, scale: Tensor, *rest: Tensor, **kwargs: Any) -> Sample:
        return Sample(name, ops.dequantize_linear.default, (x, scale, *rest), kwargs)

    def whole(*shape: int, kind: torch.dtype = torch.int8) -> Tensor:
        info = torch.iinfo(kind)
        return torch.randint(info.min, info.max + 1, shape, generator=GENERATOR, dtype=torch.int32).to(kind)

    yield sample("one", whole(B, SQ, D), rand(1)[0], whole(1)[0])
    yield sample("axis", whole(B, SQ, D), rand(SQ), whole(SQ))
    yield sample("last_axis", whole(SQ, D, kind=torch.uint8), rand(D), axis=-1)
    yield sample("transposed", whole(D, SQ).t(), rand(SQ), axis=0)
    yield sample("blocks", whole(B, D), rand(B, 2), whole(B, 2), block_size=4)
    yield sample("blocks_of_rows", whole(D, SQ, kind=torch.int16), rand(4, SQ), axis=0, block_size=2)
    yield sample("a_short_last_block", whole(B, 7), rand(B, 3), whole(B, 3), axis=-1, block_size=3)
    yield sample(
        "whole_rows", whole(B, D, kind=torch.uint8), strided(B, 1), whole(B, 1, kind=torch.uint8), block_size=D
    )
    yield sample("wide", whole(B, D, kind=torch.int32), rand(D))


def quantize_linear() -> Iterator[Sample]:
    def sample(name: str, x: Tensor, scale: Tensor, *rest: Tensor, **kwargs: Any) -> Sample:
        return Sample(name, ops.quantize_linear.default, (x, scale.abs() + 0.1, *rest), kwargs)

    def zeros(*shape: int, kind: torch.dtype = torch.int8) -> Tensor:
        return torch.randint(0, 8, shape, generator=GENERATOR).to(kind)

    yield sample("one", rand(B, SQ, D), rand(1)[0], zeros(1, kind=torch.uint8)[0])
    yield sample("no_zero_point", rand(B, SQ, D), rand(1)[0], output_dtype=3)
    yield sample("axis", rand(B, SQ, D), rand(SQ), zeros(SQ))
    yield sample("transposed", rand(D, SQ).t(), rand(SQ), axis=0)
    yield sample("blocks", rand(B, D), rand(B, 2), zeros(B, 2), block_size=4)
    yield sample("a_short_last_block", rand(B, 7) * 100, rand(B, 3), zeros(B, 3), axis=-1, block_size=3)
    yield sample("wide", rand(B, D) * 1000, rand(D), zeros(D, kind=torch.int16))


SAMPLES = [
    *rms_norm(),
    *layer_norm(),
    *rotary_embedding(),
    *attention(),
    *tensor_scatter(),
    *dequantize_linear(),
    *quantize_linear(),
]
assert {sample.op for sample in SAMPLES} == set(fxfuse.ops.OPS)
