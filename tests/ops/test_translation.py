"""Each operator becomes one ONNX node that carries what it must and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from fxfuse.errors import FxfuseError
from fxfuse.ops import OPS, translation_table
from fxfuse.ops.registry import PARTS

ops = torch.ops.fxfuse
BATCH, LENGTH, PAST = (torch.export.Dim(name, min=1, max=512) for name in ("batch", "length", "past"))


class Program(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def export(function: Callable[..., Any], *args: Tensor, shapes: Any = None, opset: int = 24) -> onnx.ModelProto:
    program = torch.onnx.export(
        Program(function).eval(),
        args,
        dynamo=True,
        opset_version=opset,
        custom_translation_table=translation_table(opset),
        dynamic_shapes=None if shapes is None else (tuple(shapes),),
        verbose=False,
    )
    assert program is not None
    onnx.checker.check_model(program.model_proto, full_check=True)
    return program.model_proto


def the_node(model: onnx.ModelProto) -> tuple[str, list[bool], int, dict[str, Any]]:
    """The only node: operator, which inputs it has, how many outputs, attributes."""
    (node,) = model.graph.node
    assert not model.functions
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return node.op_type, [bool(name) for name in node.input], len(node.output), attributes


def test_rms_norm() -> None:
    x, w = torch.randn(2, 3, 8), torch.randn(8)
    shapes = [{0: BATCH, 1: LENGTH}, None]
    model = export(lambda x, w: ops.rms_norm(x, w), x, w, shapes=shapes, opset=23)
    assert the_node(model) == ("RMSNormalization", [True, True], 1, {})
    assert [d.dim_param for d in model.graph.output[0].type.tensor_type.shape.dim][:2] == ["batch", "length"]
    model = export(lambda x, w: ops.rms_norm(x, w, axis=-2, epsilon=0.5, stash_type=11), x, w[:1])
    assert the_node(model)[3] == {"axis": -2, "epsilon": 0.5, "stash_type": 11}


def test_layer_norm() -> None:
    x, w = torch.randn(2, 3, 8), torch.randn(8)
    shapes = [{0: BATCH, 1: LENGTH}, None, None]
    model = export(lambda x, w, b: ops.layer_norm(x, w, b), x, w, w, shapes=shapes, opset=23)
    assert the_node(model) == ("LayerNormalization", [True, True, True], 1, {})
    model = export(lambda x, w: ops.layer_norm(x, w, epsilon=0.5), x, w)
    assert the_node(model) == ("LayerNormalization", [True, True], 1, {"epsilon": 0.5})


def test_rotary_embedding() -> None:
    x, cos, ids = torch.randn(2, 3, 16), torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    shapes = [{0: BATCH, 1: LENGTH}] * 3
    model = export(lambda x, c, s: ops.rotary_embedding(x, c, s, num_heads=2), x, cos, cos, shapes=shapes, opset=23)
    assert the_node(model) == ("RotaryEmbedding", [True] * 3, 1, {"num_heads": 2})

    def partial(x: Tensor, c: Tensor, s: Tensor, i: Tensor) -> Tensor:
        return ops.rotary_embedding(x, c, s, i, interleaved=1, num_heads=2, rotary_embedding_dim=4)

    model = export(partial, x, cos[0, :, :2], cos[0, :, :2], ids)
    assert the_node(model)[1] == [True] * 4
    assert the_node(model)[3] == {"interleaved": 1, "num_heads": 2, "rotary_embedding_dim": 4}


def test_attention() -> None:
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
    shapes = [{0: BATCH, 2: LENGTH}] * 3
    model = export(lambda q, k, v: ops.attention(q, k, v, is_causal=1), q, k, k.clone(), shapes=shapes, opset=23)
    assert the_node(model) == ("Attention", [True] * 3, 1, {"is_causal": 1})

    def heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, q_num_heads=4, kv_num_heads=2, scale=0.5, softcap=2.0, softmax_precision=1)

    model = export(heads, torch.randn(2, 3, 32), torch.randn(2, 3, 16), torch.randn(2, 3, 16))
    attributes = {"q_num_heads": 4, "kv_num_heads": 2, "scale": 0.5, "softcap": 2.0, "softmax_precision": 1}
    assert the_node(model)[3] == attributes
    # With four dims the head counts say nothing new, and opset 25 forbids them.
    model = export(lambda q, k, v: ops.attention(q, k, v, q_num_heads=4, kv_num_heads=2), q, k, k.clone())
    assert the_node(model)[3] == {}


def test_attention_with_present() -> None:
    q, k, past = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 2, 5, 8)

    def grow(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Any:
        return ops.attention_with_present(q, k, v, None, pk, pv, is_causal=1)

    shapes = [{0: BATCH, 2: LENGTH}] * 3 + [{0: BATCH, 2: PAST}] * 2
    model = export(grow, q, k, k.clone(), past, past.clone(), shapes=shapes, opset=23)
    assert the_node(model) == ("Attention", [True, True, True, False, True, True], 3, {"is_causal": 1})
    assert model.graph.output[1].type.tensor_type.shape.dim[2].dim_param


def test_attention_with_qk() -> None:
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
    model = export(lambda q, k, v: ops.attention_with_qk(q, k, v, qk_matmul_output_mode=3), q, k, k.clone())
    assert the_node(model) == ("Attention", [True] * 3, 4, {"qk_matmul_output_mode": 3})


def test_static_cache() -> None:
    q, cache, lengths = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8), torch.tensor([3, 8])

    def step(q: Tensor, k: Tensor, v: Tensor, new: Tensor, at: Tensor, lengths: Tensor) -> Any:
        k = ops.tensor_scatter(k, new, at)
        return ops.attention(q, k, v, None, None, None, lengths, is_causal=1), k

    model = export(step, q, cache, cache.clone(), torch.randn(2, 2, 1, 8), lengths - 1, lengths)
    scatter, attention = model.graph.node
    assert (scatter.op_type, len(scatter.input), list(scatter.attribute)) == ("TensorScatter", 3, [])
    assert [bool(name) for name in attention.input] == [True, True, True, False, False, False, True]

    model = export(lambda c, u: ops.tensor_scatter(c, u, axis=1, mode="circular"), cache, cache[:, :1])
    assert the_node(model) == ("TensorScatter", [True, True], 1, {"axis": 1, "mode": b"circular"})


def causes(error: BaseException | None) -> list[BaseException]:
    return [] if error is None else [error, *causes(error.__cause__)]


def test_what_opset_23_does_not_have() -> None:
    q, k, lengths = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8), torch.tensor([3, 8])

    def padded(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return ops.attention(q, k, v, None, None, None, lengths)

    for function, args in ((padded, (q, k, k.clone(), lengths)), (ops.tensor_scatter, (k, k[:, :, :1]))):
        with pytest.raises(Exception) as caught:
            export(function, *args, opset=23)
        ours = [error for error in causes(caught.value) if isinstance(error, FxfuseError)]
        assert ours and "24" in str(ours[0]) and ours[0].hint == "export with opset_version=24"


@pytest.mark.parametrize("opset", [20, 22, 26])
def test_other_opsets_are_refused(opset: int) -> None:
    with pytest.raises(FxfuseError, match="opsets 23 to 25"):
        translation_table(opset)


def test_every_operator_is_listed() -> None:
    assert {op.onnx_name for op in OPS.values()} == {
        "LayerNormalization",
        "RMSNormalization",
        "RotaryEmbedding",
        "Attention",
        "TensorScatter",
        "DequantizeLinear",
        "QuantizeLinear",
    }
    for opset in (23, 24, 25):
        assert set(translation_table(opset)) == set(OPS) | set(PARTS)
