"""Sinks written beside flex_attention, by its log-sum-exp: one Attention with one more key, or right all the same."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.export import Dim
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fxfuse
import fxfuse.onnx

HEADS, SIZE = 4, 8
FREE = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC},) * 3


def window(b, h, q, kv):
    return (q > kv) & (q - kv < 4)


class Attention(nn.Module):
    """q [B, 4, S, 8], k and v [B, 2, S, 8]; the first row sees nothing, and is 0 with sinks and without."""

    def __init__(self, apply):
        super().__init__()
        torch.manual_seed(0)
        self.apply_sinks = apply
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.other = nn.Parameter(torch.randn(HEADS))

    def forward(self, q, k, v):
        mask = create_block_mask(window, None, None, q.shape[2], k.shape[2], device=q.device)
        y, lse = flex_attention(
            q,
            k,
            v,
            score_mod=lambda s, b, h, i, j: s + 0.1 * (j - i),
            block_mask=mask,
            enable_gqa=True,
            return_lse=True,
        )
        return self.apply_sinks(self, y, lse)


def gpt_oss(m, y, lse):
    """As transformers writes it."""
    lse = lse.to(y.dtype).unsqueeze(-1)
    b, h, s, _ = y.shape
    combined = torch.logsumexp(torch.cat([lse, m.sinks.view(1, -1, 1, 1).expand(b, h, s, 1)], -1), -1, keepdim=True)
    return (y * torch.exp(lse - combined)).to(y.dtype)


def sigmoid(m, y, lse):
    return y * torch.sigmoid(lse - m.sinks.view(1, -1, 1)).unsqueeze(-1).to(y.dtype)


def quotient(m, y, lse):
    return y / (1 + torch.exp(m.sinks[:, None] - lse))[..., None]


def heads_last(m, y, lse):
    share = torch.sigmoid(lse.transpose(1, 2) - m.sinks)
    return y * share.transpose(1, 2).unsqueeze(-1)


def off_by_one(m, y, lse):
    """https://www.evanmiller.org/attention-is-off-by-one.html: a sink of 0 in every head."""
    return y * torch.sigmoid(lse).unsqueeze(-1)


def computed(m, y, lse):
    return y * torch.sigmoid(lse - (2 * m.sinks + m.other).view(1, -1, 1)).unsqueeze(-1)


def twice(m, y, lse):
    """Steeper than a softmax."""
    return y * torch.sigmoid(2 * lse - m.sinks.view(1, -1, 1)).unsqueeze(-1)


def in_twos(m, y, lse):
    """The log-sum-exp in units of log 2, the sinks not."""
    return y * torch.sigmoid(lse / 0.6931471805599453 - m.sinks.view(1, -1, 1)).unsqueeze(-1)


def complement(m, y, lse):
    return y * torch.sigmoid(m.sinks.view(1, -1, 1) - lse).unsqueeze(-1)


def gate(m, y, lse):
    """A share of the head, whatever its scores are."""
    return y * torch.sigmoid(m.sinks.view(1, -1, 1) + 0 * lse).unsqueeze(-1)


def two_tensors(m, y, lse):
    return y * torch.sigmoid(lse - m.sinks.view(1, -1, 1) * lse.sign() * m.other.view(1, -1, 1)).unsqueeze(-1)


def lse_too(m, y, lse):
    """What is read beside is computed beside."""
    return sigmoid(m, y, lse), lse


def plain_too(m, y, lse):
    return sigmoid(m, y, lse) + y.sum()


ONE_NODE = [gpt_oss, sigmoid, quotient, heads_last, off_by_one, computed]
BESIDE = [twice, in_twos, complement, gate, two_tensors, lse_too, plain_too]


def inputs(b, s, dtype=torch.float32):
    draw = torch.Generator().manual_seed(b * 100 + s)
    return tuple(torch.randn(b, h, s, SIZE, generator=draw).to(dtype) for h in (HEADS, 2, 2))


def capture(model, args, dynamic=True):
    with fxfuse.flex_capture(), torch.no_grad():
        return torch.export.export(model, args, dynamic_shapes=FREE if dynamic else None)


def run(onnx, args):
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(onnx.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return [torch.from_numpy(t) for t in session.run(None, {n: a.numpy() for n, a in zip(names, args, strict=True)})]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def agree(actual, expected, **tolerance):
    actual, expected = ((t if isinstance(t, (tuple, list)) else (t,)) for t in (actual, expected))
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, **{"rtol": 1e-5, "atol": 2e-6, **tolerance})


@pytest.mark.parametrize(
    ("apply", "dynamic"), [(gpt_oss, False), (off_by_one, False), *((apply, True) for apply in ONE_NODE)]
)
def test_is_one_attention(apply, dynamic):
    """In PyTorch and in ONNX Runtime, at the exported sizes and, where they are free, at others."""
    model = Attention(apply).eval()
    program = capture(model, inputs(2, 9), dynamic)
    fused = fxfuse.fuse(program)
    report = fxfuse.report(fused)
    (entry,) = report
    assert entry.status == "fused" and "sinks" in entry.parameters
    assert not any(n.target is torch.ops.aten.logsumexp.default for n in fused.graph.nodes)
    onnx = fxfuse.onnx.export(program)
    kinds = [n.op_type for n in onnx.model.graph]
    assert kinds.count("Attention") == 1 and "MatMul" not in kinds
    for sizes in ((2, 9), (3, 17), (1, 5)) if dynamic else ((2, 9),):
        args = inputs(*sizes)
        with torch.no_grad():
            expected, actual = model(*args), fused.module()(*args)
        agree(actual, expected)
        agree(run(onnx, args), expected)


@pytest.mark.parametrize("apply", BESIDE, ids=lambda f: f.__name__)
def test_what_is_no_sink_stays_beside(apply):
    model = Attention(apply).eval()
    fused = fxfuse.fuse(capture(model, inputs(2, 9)))
    assert [e.status for e in fxfuse.report(fused)] == ["fused", "decomposed"]
    assert not any("sinks" in e.parameters for e in fxfuse.report(fused))
    args = inputs(3, 17)
    with torch.no_grad():
        agree(fused.module()(*args), model(*args), equal_nan=True)  # 0 · -inf, of the row that sees nothing


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model, args = Attention(gpt_oss).to(dtype).eval(), inputs(2, 30, dtype)
    fused = fxfuse.fuse(capture(model, args))
    (entry,) = fxfuse.report(fused)
    assert "sinks" in entry.parameters
    with torch.no_grad():
        exact = Attention(gpt_oss).to(dtype).double()(*(a.double() for a in args))
        ours, theirs = ((f(*args).double() - exact).abs().max() for f in (fused.module(), model))
    assert ours <= 1.5 * theirs + torch.finfo(dtype).eps


def test_sinks_have_gradients():
    model, args = Attention(sigmoid), inputs(2, 9)
    fused = fxfuse.fuse(capture(model, args)).module()
    for module in (model, fused):
        module(*args).square().sum().backward()
    agree(fused.sinks.grad, model.sinks.grad, rtol=1e-4, atol=1e-5)


def test_gpt_oss(monkeypatch):
    """transformers' own function, but for the line that asks for no log-sum-exp on a CPU: it refuses sinks there."""
    transformers = pytest.importorskip("transformers")
    integration = pytest.importorskip("transformers.integrations.flex_attention")
    source = inspect.getsource(integration.flex_attention_forward)
    line = 'return_lse = query.device.type != "cpu"'
    assert line in source
    scope = vars(integration).copy()
    exec(source.replace(line, "return_lse = True"), scope)
    table = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setitem(table._global_mapping, "flex_attention", scope["flex_attention_forward"])
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=4,
        max_position_embeddings=64,
    )
    model = transformers.GptOssForCausalLM(config).eval()
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.sinks)
    model.set_attn_implementation("flex_attention")

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    onnx = fxfuse.onnx.export(Logits().eval(), (torch.arange(22).reshape(2, 11),), dynamic_shapes=(free,))
    found = fxfuse.report(onnx).fused("Attention")
    assert len(found) == 2 and all(e.parameters["sinks"] == "[1, H, 1, 1]" for e in found)
    assert [n.op_type for n in onnx.model_proto.graph.node].count("Attention") == 2
    model.set_attn_implementation("eager")
    for shape in ((3, 7), (1, 19)):
        ids = torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            agree(run(onnx, (ids,)), Logits().eval()(ids), rtol=1e-4, atol=1e-5)
