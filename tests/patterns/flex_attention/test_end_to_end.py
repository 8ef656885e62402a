"""Models of transformers and TorchTune with flex_attention, from the module to ONNX Runtime at other lengths."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.export import Dim

import fxfuse
import fxfuse.onnx

transformers = pytest.importorskip("transformers")
ort = pytest.importorskip("onnxruntime")
FREE = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
DECODERS = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Gemma2": {"sliding_window": 4, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
}


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask=None):
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def decoder(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **DECODERS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.set_attn_implementation("flex_attention")
    return model


def batch(b, s, padded):
    generator = torch.Generator().manual_seed(s)
    ids = torch.randint(0, 64, (b, s), generator=generator)
    mask = torch.ones(b, s, dtype=torch.long)
    mask[0, :2] = mask[-1, 5:] = 0
    return (ids, mask) if padded else (ids,)


def run(onnx, args):
    session = ort.InferenceSession(onnx.model_proto.SerializeToString())
    names = [i.name for i in session.get_inputs()]
    return torch.tensor(session.run(None, {n: a.numpy() for n, a in zip(names, args, strict=True)})[0])


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("padded", [False, True], ids=["no mask", "padded"])
@pytest.mark.parametrize("name", DECODERS)
def test_transformers(name, padded):
    """Against the model's own eager attention, which knows nothing of flex_attention; one standard node a layer."""
    model = decoder(name)
    ids = torch.arange(22).reshape(2, 11)
    args = (ids, torch.ones_like(ids)) if padded else (ids,)  # a mask that is all true is a mask nevertheless
    onnx = fxfuse.onnx.export(Logits(model).eval(), args, dynamic_shapes=(FREE,) * len(args))
    kinds = [n.op_type for n in onnx.model_proto.graph.node]
    assert kinds.count("Attention") == 2 and kinds.count("RotaryEmbedding") == 4
    # Without a mask transformers masks by positions that it counts itself: nothing is left of them.
    found = fxfuse.report(onnx).fused("Attention")
    assert [e.parameters["is_causal"] for e in found] == [1, 1]
    assert ("boolean mask" in found[-1].parameters) == (padded or name == "Mistral")
    assert "GatherND" not in kinds or padded
    model.set_attn_implementation("eager")
    for shape in ((3, 7), (1, 19)):
        args = batch(*shape, padded)
        with torch.no_grad():
            expected = Logits(model).eval()(*args)
        kept = args[1].bool() if padded else torch.ones(shape, dtype=torch.bool)
        torch.testing.assert_close(run(onnx, args)[kept], expected[kept], rtol=1e-4, atol=1e-5)


def test_torchtune_packed_batches():
    """`packed_block_causal_mask` is the argument; compared with TorchTune's own mask [B, S, S]."""
    llama3 = pytest.importorskip("torchtune.models.llama3").llama3
    from torchtune.modules import packed_block_causal_mask

    torch.manual_seed(0)
    model = llama3(vocab_size=64, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=64).eval()

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens, mask):
            return self.model(tokens, mask=mask)

    def packs(*lengths):
        return [torch.tensor(pack) for pack in lengths]

    def tokens(b, s):
        return torch.randint(0, 64, (b, s), generator=torch.Generator().manual_seed(s))

    with fxfuse.flex_capture():
        mask = packed_block_causal_mask(packs([5, 7], [12]))
        program = torch.export.export(Packed(), (tokens(2, 12), mask), dynamic_shapes=(FREE, [FREE]))
        longer = packed_block_causal_mask(packs([3, 12], [8, 7], [1, 14]))
    onnx = fxfuse.onnx.export(program)
    assert [n.op_type for n in onnx.model_proto.graph.node].count("Attention") == 2
    documents = longer.mask_mod.__closure__[0].cell_contents
    with torch.no_grad():
        same = documents[:, :, None] == documents[:, None, :]
        expected = model(tokens(3, 15), mask=same & torch.ones(15, 15, dtype=torch.bool).tril())
    torch.testing.assert_close(run(onnx, (tokens(3, 15), documents)), expected, rtol=1e-4, atol=1e-5)
