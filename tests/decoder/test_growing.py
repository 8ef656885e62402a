"""A cache that grows: keys joined to their past become Attention with a past and a present."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import fxfuse
from fxfuse.decoder.export import export_decoder
from fxfuse.parity.ort import onnxruntime_outputs
from tests.decoder.models import CONFIGS, PADDED, PROMPT, Decoder, build, expected, operators

SAMPLE = ("llama",)


class Step(nn.Module):
    """Attention of four heads over a cache of two; `layout` says where the past lies and what is done to the keys."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.qkv = nn.Linear(32, 32 + 16 + 16)

    def forward(self, x: torch.Tensor, past_k: torch.Tensor, past_v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.layout == "chunk":  # heads of q, k and v side by side
            q, k, v = self.qkv(x).unflatten(-1, (2, 32)).split([16, 8, 8], -1)
            q = q.unflatten(-1, (2, 8)).flatten(2, 3)
        else:
            q, k, v = (t.unflatten(-1, (-1, 8)) for t in self.qkv(x).split([32, 16, 16], -1))
        if self.layout == "BSHD":
            k, v = torch.cat([past_k, k], 1), torch.cat([past_v, v], 1)
            present = k, v
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        else:
            k, v = torch.concat([past_k, k.transpose(1, 2)], 2), torch.concat([past_v, v.transpose(1, 2)], -2)
            present = k, v
        if self.layout == "cast":  # to the type that they have
            k = k.to(torch.float32)
            present = k, v
        if self.layout == "scaled after":
            k = k * k.float().square().mean(-1, keepdim=True).rsqrt()
        if self.layout == "read before":
            q = q + k.mean((1, 2, 3), keepdim=True)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        mask = torch.arange(k.shape[2]) <= torch.arange(x.shape[1]).unsqueeze(1) + (k.shape[2] - x.shape[1])
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask)
        if self.layout == "read twice":
            y = y + F.scaled_dot_product_attention(2 * q.transpose(1, 2), k, v, mask)
        return y.transpose(1, 2).flatten(2), *present


def capture(layout: str) -> tuple[ExportedProgram, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    past = (2, 4, 2, 8) if layout == "BSHD" else (2, 2, 4, 8)
    args = (torch.randn(2, 3, 32), torch.randn(past), torch.randn(past))
    axis = 1 if layout == "BSHD" else 2
    batch, new, old = Dim("batch"), Dim("new"), Dim("old")
    shapes = ({0: batch, 1: new}, {0: batch, axis: old}, {0: batch, axis: old})
    return torch.export.export(Step(layout).eval(), args, dynamic_shapes=shapes), args


def fused_calls(program: ExportedProgram) -> dict[str, int]:
    names = (str(n.target).split(".")[1] for n in program.graph.nodes if str(n.target).startswith("fxfuse"))
    return dict(Counter(names))


@pytest.mark.parametrize("layout", ["BHSD", "read twice", "chunk", "cast"])
def test_the_joined_tensors_are_the_presents(layout: str) -> None:
    program, args = capture(layout)
    fused = fxfuse.fuse(program)
    twice = layout == "read twice"
    assert fused_calls(fused) == {"attention_with_present": 1} | ({"attention": 1} if twice else {})
    assert fxfuse.report(fused).counts == {"Attention": 1 + twice, "KVCache": 1}
    assert not any("cat" in str(n.target) for n in fused.graph.nodes)
    for expected_, actual in zip(program.module()(*args), fused.module()(*args), strict=True):
        torch.testing.assert_close(actual, expected_)


@pytest.mark.parametrize(
    "layout, reason",
    [
        ("BSHD", "of its 4 axes 1 grows"),
        ("scaled after", "its keys go through rms_norm after they are cached"),
        ("read before", "mean reads it before the attention does"),
    ],
)
def test_what_stays_joined_says_why(layout: str, reason: str) -> None:
    fused = fxfuse.fuse(capture(layout)[0])
    assert "KVCache" not in fxfuse.report(fused).counts and fused_calls(fused)["attention"] == 1
    assert any(reason in (entry.reason or "") for entry in fxfuse.report(fused) if entry.operator == "KVCache")


class Prefix(nn.Module):
    """Learned keys and values before the others; `read` names which of the joined ones leave the model."""

    def __init__(self, read: str) -> None:
        super().__init__()
        self.read = read
        self.k, self.v = nn.Parameter(torch.randn(4, 2, 8)), nn.Parameter(torch.randn(4, 2, 8))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        batch = q.shape[0]
        k, v = (torch.cat([p.expand(batch, 4, 2, 8), t], 2) for p, t in ((self.k, k), (self.v, v)))
        y = F.scaled_dot_product_attention(q, k, v)
        return y, *({"k": k, "v": v}[name] for name in self.read)


@pytest.mark.parametrize("read", ["", "k", "v", "kv"])
def test_joined_keys_that_only_the_attention_reads_are_no_cache(read: str) -> None:
    model, axes = Prefix(read).eval(), {0: Dim.AUTO, 2: Dim.AUTO}
    made = [tuple(torch.randn(*shape, 8) for _ in range(3)) for shape in ((2, 4, 5), (3, 4, 7))]
    program = fxfuse.onnx.export(model, made[0], dynamic_shapes=[axes] * 3)
    assert fxfuse.report(program).counts == {"Attention": 1} | ({"KVCache": 1} if read == "kv" else {})
    args = made[1]
    for expected_, actual in zip(model(*args), onnxruntime_outputs(program, args), strict=True):
        torch.testing.assert_close(actual, expected_, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS if n not in SAMPLE)]
)
def test_decoders_prefill_and_decode(name: str, tmp_path: Path) -> None:
    """From no past at all, in one call and in chunks, and on, token by token; the padded row included."""
    model = build(name)
    program = export_decoder(model)
    assert fxfuse.report(program).counts["KVCache"] == 2
    names = [value.name for value in program.graph.outputs]
    producers = {value.producer().op_type for value in program.graph.outputs if value.name != "logits"}
    assert producers == {"Attention"} and names[1:3] == ["present.0.key", "present.0.value"]
    tokens, logits = expected(model, PROMPT, PADDED, 6)
    decoder = Decoder(program, tmp_path)
    for chunk in (None, 2):
        ours, values = decoder.greedy(PROMPT, PADDED, 6, chunk)
        torch.testing.assert_close(values, logits, atol=2e-5, rtol=1e-4)
        assert torch.equal(ours, tokens)
    assert operators(program).count("Attention") == 2
