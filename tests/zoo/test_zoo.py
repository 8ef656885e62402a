"""Decoders of transformers: every norm, rotation and attention one standard operator, and the same numbers.

The default run has the architectures of `expected.py`; `python -m tests.zoo.coverage` runs all of transformers'.
"""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim

import fxfuse
import fxfuse.onnx
from fxfuse.parity.ort import OnnxRuntime

from . import graphs
from .expected import EXPECTED
from .models import build, padded, tokens

pytest.importorskip("transformers")

DYNAMIC = {0: "batch", 1: "sequence"}
AUTO = {0: Dim.AUTO, 1: Dim.AUTO}
HALF = {"phi3", "gemma2", "qwen3", "glm", "deepseek_v3", "gpt_oss", "codegen", "olmo2", "llama4_text"}
"""Architectures whose float16 graphs the default run has; the slow run has all."""
EAGER = {"llama", "gemma3_text", "glm", "gpt_neox", "deepseek_v3", "doge", "mistral", "olmo2"}


def every(selected: set[str], without: frozenset[str] | set[str] = frozenset()) -> list[object]:
    return [a if a in selected else pytest.param(a, marks=pytest.mark.slow) for a in EXPECTED if a not in without]


def check_counts(arch: str, program: torch.onnx.ONNXProgram) -> None:
    expected = EXPECTED[arch]
    assert graphs.counts(program.model) == expected[:3], fxfuse.report(program)
    assert fxfuse.report(program).counts.get("LayerNormalization", 0) == expected.layer_norms
    assert not graphs.expanded_keys(program.model)
    for entry in fxfuse.report(program).fused("Attention"):
        assert entry.parameters["kv_num_heads"] == expected.kv_heads


@pytest.mark.parametrize("arch", EXPECTED)
def test_float32_in_onnx_runtime(arch: str) -> None:
    model = build(arch)
    program = fxfuse.onnx.export(model, (tokens(2, 16),), dynamic_shapes={"input_ids": DYNAMIC})
    check_counts(arch, program)
    run = OnnxRuntime(program)
    for batch, length in ((2, 16), (3, 11), (1, 7)):
        ids = tokens(batch, length, seed=length)
        with torch.no_grad():
            expected = model(ids)
        (got,) = run(ids)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("arch", every(HALF))
def test_float16_in_onnx_runtime(arch: str) -> None:
    """As near to float32 as the model itself is in float16."""
    model, wide = build(arch, dtype=torch.float16), build(arch)
    program = fxfuse.onnx.export(model, (tokens(2, 16),), dynamic_shapes={"input_ids": DYNAMIC})
    check_counts(arch, program)
    run = OnnxRuntime(program)
    for batch, length in ((2, 16), (3, 11)):
        ids = tokens(batch, length, seed=length)
        with torch.no_grad():
            theirs, exact = model(ids).float(), wide(ids)
        ours = run(ids)[0].float()
        allowed = 2 * (theirs - exact).abs().mean() + 1e-3 * exact.abs().mean()
        assert (ours - exact).abs().mean() <= allowed


@pytest.mark.parametrize("arch", every({"qwen3", "gemma2", "gpt_oss", "deepseek_v3"}))
def test_bfloat16_in_pytorch(arch: str) -> None:
    model, wide, ids = build(arch, dtype=torch.bfloat16), build(arch), tokens(2, 16)
    program = torch.export.export(model, (ids,), dynamic_shapes={"input_ids": AUTO})
    fused = fxfuse.fuse(program)
    found = fxfuse.report(fused).counts
    wanted = dict(zip(("RMSNormalization", "RotaryEmbedding", "Attention"), EXPECTED[arch][:3], strict=True))
    wanted["LayerNormalization"] = EXPECTED[arch].layer_norms
    assert found == {k: v for k, v in wanted.items() if v}, fxfuse.report(fused)
    with torch.no_grad():
        exact, theirs, ours = wide(ids), model(ids).float(), fused.module()(ids).float()
    assert (ours - exact).abs().mean() <= 2 * (theirs - exact).abs().mean()


SCALED = [
    ("llama", {"rope_type": "linear", "factor": 2.0}),
    ("llama", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    (
        "llama",
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    (
        "phi3",
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 32,
        },
    ),
]


@pytest.mark.parametrize(("arch", "scaling"), SCALED, ids=[s["rope_type"] for _, s in SCALED])
def test_scaled_angles(arch: str, scaling: dict[str, object]) -> None:
    """Also beyond the length that the model was trained at, where longrope takes other factors."""
    model = build(arch, rope_parameters={"rope_theta": 10000.0, **scaling})
    fused = fxfuse.fuse(torch.export.export(model, (tokens(2, 16),), dynamic_shapes={"input_ids": AUTO}))
    assert fxfuse.report(fused).counts["RotaryEmbedding"] == EXPECTED[arch].rotations
    for batch, length in ((2, 16), (3, 11), (1, 50)):
        ids = tokens(batch, length)
        with torch.no_grad():
            torch.testing.assert_close(fused.module()(ids), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", every(EAGER, without={"bamba"}))  # torch.export guards its length: see tests/onnx
def test_padding_on_either_side_and_positions(arch: str, attention: str) -> None:
    model = build(arch, attention=attention)
    names = ("input_ids", "attention_mask", "position_ids")
    program = torch.export.export(model, padded(2, 16, "left"), dynamic_shapes=dict.fromkeys(names, AUTO))
    fused = fxfuse.fuse(program)
    found = fxfuse.report(fused).counts
    wanted = dict(zip(("RMSNormalization", "RotaryEmbedding", "Attention"), EXPECTED[arch][:3], strict=True))
    wanted["LayerNormalization"] = EXPECTED[arch].layer_norms
    assert found == {k: v for k, v in wanted.items() if v}, fxfuse.report(fused)
    for batch, length, side in ((2, 16, "left"), (3, 11, "left"), (2, 9, "right")):
        inputs = padded(batch, length, side, seed=length)
        with torch.no_grad():
            ours, theirs = fused.module()(*inputs), model(*inputs)
        real = inputs[1].bool()
        torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=1e-4)
