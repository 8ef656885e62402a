"""Arguments that do not fit are refused with the argument's name, by the real and by the fake implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fxfuse.ops
from fxfuse.errors import FxfuseError

assert fxfuse.ops.OPS
ops = torch.ops.fxfuse
X3, X4 = torch.zeros(2, 3, 16), torch.zeros(2, 4, 3, 8)
Q, KV, COS = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8), torch.zeros(2, 3, 4)
PAST, INT = torch.zeros(2, 2, 1, 8), torch.zeros(2, 3, dtype=torch.int64)

WRONG: list[tuple[str, Any, tuple[Tensor | None, ...], dict[str, Any]]] = [
    ("axis", ops.rms_norm, (X3, X3[0, 0]), {"axis": 3}),
    ("scale", ops.rms_norm, (X3, torch.zeros(4)), {}),
    ("scale", ops.rms_norm, (X3, torch.zeros(1, 1, 1, 16)), {}),
    ("X", ops.rms_norm, (INT, X3), {}),
    ("stash_type", ops.rms_norm, (X3, X3[0, 0]), {"stash_type": 7}),
    ("num_heads", ops.rotary_embedding, (X3, COS, COS), {}),
    ("num_heads", ops.rotary_embedding, (X3, COS, COS), {"num_heads": 3}),
    ("X", ops.rotary_embedding, (X3[0], COS, COS), {"num_heads": 2}),
    ("cos_cache", ops.rotary_embedding, (X4, COS[:1], COS), {}),
    ("sin_cache", ops.rotary_embedding, (X4, COS, COS[..., :2]), {}),
    ("cos_cache", ops.rotary_embedding, (X4, COS.double(), COS), {}),
    ("cos_cache", ops.rotary_embedding, (X4, COS, COS, INT), {}),
    ("position_ids", ops.rotary_embedding, (X4, COS[0], COS[0], INT[:1]), {}),
    ("position_ids", ops.rotary_embedding, (X4, COS[0], COS[0], INT.int()), {}),
    ("rotary_embedding_dim", ops.rotary_embedding, (X4, COS, COS), {"rotary_embedding_dim": 10}),
    ("rotary_embedding_dim", ops.rotary_embedding, (X4, COS, COS), {"rotary_embedding_dim": 3}),
    ("interleaved", ops.rotary_embedding, (X4, COS, COS), {"interleaved": 2}),
    ("Q", ops.attention, (Q[0, 0], KV, KV), {}),
    ("K", ops.attention, (Q, KV[0], KV), {}),
    ("K", ops.attention, (Q, KV[..., :4], KV), {}),
    ("K", ops.attention, (Q, KV[:1], KV), {}),
    ("V", ops.attention, (Q, KV, KV[:, :, :4]), {}),
    ("V", ops.attention, (Q, KV, KV.half()), {}),
    ("q_num_heads", ops.attention, (X3, X3, X3), {"kv_num_heads": 2}),
    ("kv_num_heads", ops.attention, (X3, X3, X3), {"q_num_heads": 2, "kv_num_heads": 3}),
    ("q_num_heads", ops.attention, (Q, KV, KV), {"q_num_heads": 2}),
    ("q_num_heads", ops.attention, (Q[:, :3], KV, KV), {}),
    ("past_key", ops.attention, (Q, KV, KV, None, PAST), {}),
    ("past_value", ops.attention, (Q, KV, KV, None, PAST, PAST[:, :, :0]), {}),
    ("attn_mask", ops.attention, (Q, KV, KV, torch.zeros(3, 6)), {}),
    ("attn_mask", ops.attention, (Q, KV, KV, torch.zeros(2, 5)), {}),
    ("attn_mask", ops.attention, (Q, KV, KV, torch.zeros(3, 5).half()), {}),
    ("attn_mask", ops.attention, (Q, KV, KV, torch.zeros(1, 1, 1, 3, 5)), {}),
    ("nonpad_kv_seqlen", ops.attention, (Q, KV, KV, None, PAST, PAST, INT[:, 0]), {}),
    ("nonpad_kv_seqlen", ops.attention, (Q, KV, KV, None, None, None, INT[0]), {}),
    ("nonpad_kv_seqlen", ops.attention_with_present, (Q, KV, KV, None, None, None, INT[:, 0]), {}),
    ("is_causal", ops.attention, (Q, KV, KV), {"is_causal": 2}),
    ("qk_matmul_output_mode", ops.attention_with_qk, (Q, KV, KV), {"qk_matmul_output_mode": 4}),
    ("softcap", ops.attention, (Q, KV, KV), {"softcap": -1.0}),
    ("softmax_precision", ops.attention, (Q, KV, KV), {"softmax_precision": 7}),
    ("axis", ops.tensor_scatter, (KV, KV), {"axis": 0}),
    ("mode", ops.tensor_scatter, (KV, KV), {"mode": "ring"}),
    ("update", ops.tensor_scatter, (KV, torch.zeros(2, 2, 6, 8)), {}),
    ("update", ops.tensor_scatter, (KV, torch.zeros(2, 2, 1, 4)), {}),
    ("update", ops.tensor_scatter, (KV, KV.half()), {}),
    ("write_indices", ops.tensor_scatter, (KV, KV, INT), {}),
    ("write_indices", ops.tensor_scatter, (KV, KV, INT[:, 0].int()), {}),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: f"{case[1].__name__}-{case[0]}")
def test_refused_by_name(case: Any) -> None:
    where, op, args, kwargs = case
    with pytest.raises(FxfuseError) as real:
        op(*args, **kwargs)
    assert real.value.where == where
    with FakeTensorMode() as mode, pytest.raises(FxfuseError) as fake:
        op(*(None if arg is None else mode.from_tensor(arg) for arg in args), **kwargs)
    assert str(fake.value) == str(real.value)


@pytest.mark.parametrize("at", [[-1, 0], [0, 5]])
def test_a_write_outside_of_the_cache_is_refused(at: list[int]) -> None:
    with pytest.raises(FxfuseError, match="do not fit a cache of 5") as caught:
        ops.tensor_scatter(KV, KV[:, :, :1], torch.tensor(at))
    assert caught.value.where == "write_indices"
    ops.tensor_scatter(KV, KV[:, :, :1], torch.tensor(at), mode="circular")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_a_cache_may_have_any_dtype(dtype: torch.dtype) -> None:
    cache, update = torch.zeros(2, 4, 3).to(dtype), torch.ones(2, 1, 3).to(dtype)
    out = ops.tensor_scatter(cache, update, torch.tensor([1, 3]))
    assert out.to(torch.float32 if dtype != torch.complex64 else dtype).abs().sum((1, 2)).tolist() == [3, 3]


def test_unknown_sizes_are_not_asked() -> None:
    """Sizes of different symbols are neither refused nor tied to each other."""
    shapes = {"q": {0: "b", 2: "s"}, "k": {0: "b", 2: "t"}, "v": {0: "b", 2: "t"}, "m": {0: "s", 1: "t"}}
    symbols = {name: torch.export.Dim(name, min=1, max=64) for name in "bst"}

    class Program(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
            return ops.attention(q, k, v, m, is_causal=1)

    program = torch.export.export(
        Program(),
        (Q, KV, KV.clone(), torch.zeros(3, 5)),
        dynamic_shapes={arg: {dim: symbols[name] for dim, name in dims.items()} for arg, dims in shapes.items()},
    )
    symbols_left = {
        str(size)
        for node in program.graph.nodes
        if node.op == "placeholder"
        for size in node.meta["val"].shape
        if not isinstance(size, int)
    }
    assert len(symbols_left) == 3
    out = program.module()(Q[:1, :, :1], KV[:1, :, :2], KV[:1, :, :2], torch.zeros(1, 2))
    assert out.shape == (1, 4, 1, 8)
