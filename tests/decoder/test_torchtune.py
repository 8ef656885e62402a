"""Decoders of torchtune as graphs with a cache, against their own forward without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchtune.models.gemma2 import gemma2
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.qwen2 import qwen2

import fxfuse
from fxfuse.decoder.export import export_decoder
from fxfuse.errors import FxfuseError
from tests.decoder.models import PADDED, PROMPT, Decoder, positions

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "max_seq_len": 64,
    "intermediate_dim": 48,
}
CAPS: dict[str, Any] = {"head_dim": 8, "hidden_capping_value": 5.0, "final_capping_value": 3.0}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama3_2": lambda: llama3_2(**SIZES),
    "gemma2": lambda: gemma2(**SIZES, **CAPS, sliding_window_size=4),
    "qwen2": lambda: qwen2(**SIZES),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


@torch.no_grad()
def expected(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens and logits of greedy decoding without a cache; a padded token is seen by nobody but itself."""
    logits = []
    for _ in range(steps):
        length = ids.shape[1]
        seen = (torch.ones(length, length).tril().bool() & mask.bool()[:, None]) | torch.eye(length).bool()
        last = model(ids, mask=seen, input_pos=positions(mask))[:, -1]
        logits.append(last)
        ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids[:, -steps:], torch.stack(logits, 1)


@pytest.mark.parametrize("name", ["llama3_2", "gemma2", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_prefill_and_decode(name: str, tmp_path: Path) -> None:
    """Of Gemma 2 every other layer has a window, which the decoding goes beyond."""
    model = build(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    program = export_decoder(model)
    assert fxfuse.report(program).counts["KVCache"] == 2
    assert [value.name for value in program.graph.inputs][:4] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values.0.key",
    ]
    heads = "4" if name == "gemma2" else "2"  # Gemma 2 repeats the heads before they are cached
    cache = next(v for v in program.graph.inputs if v.name == "past_key_values.1.value")
    assert cache.shape is not None
    assert [str(dim) for dim in cache.shape] == ["batch_size", heads, "past_sequence_length", "8"]
    tokens, logits = expected(model, PROMPT, PADDED, 6)
    decoder = Decoder(program, tmp_path)
    for chunk in (None, 2):
        ours, values = decoder.greedy(PROMPT, PADDED, 6, chunk)
        torch.testing.assert_close(values, logits, atol=2e-5, rtol=1e-4)
        assert torch.equal(ours, tokens)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(layer.attn.kv_cache is None for layer in model.layers)


def test_a_static_cache(tmp_path: Path) -> None:
    model = build("llama3_2")
    program = export_decoder(model, cache="static")
    assert sum(node.op_type == "TensorScatter" for node in program.graph) == 4
    tokens, logits = expected(model, PROMPT, PADDED, 4)
    ours, values = Decoder(program, tmp_path, length=16).greedy(PROMPT, PADDED, 4, chunk=2)
    torch.testing.assert_close(values, logits, atol=2e-5, rtol=1e-4)
    assert torch.equal(ours, tokens)


def test_caches_that_are_set_up_are_left_alone(tmp_path: Path) -> None:
    model = build("llama3_2")
    model.setup_caches(batch_size=1, dtype=torch.float32, decoder_max_seq_len=8)  # type: ignore[operator]
    program = export_decoder(model)
    _, values = Decoder(program, tmp_path).greedy(PROMPT, PADDED, 2)
    cache = model.layers[0].attn.kv_cache  # type: ignore[index,union-attr]
    assert type(cache).__name__ == "KVCache" and not cache.k_cache.any() and cache.size == 0
    torch.testing.assert_close(values, expected(build("llama3_2"), PROMPT, PADDED, 2)[1], atol=2e-5, rtol=1e-4)


def test_what_has_no_such_graph_is_named() -> None:
    with pytest.raises(FxfuseError, match="names"):
        export_decoder(build("llama3_2"), names="hf")
    model = build("llama3_2")
    model.layers[1] = nn.Identity()  # type: ignore[index,operator]
    with pytest.raises(FxfuseError, match=r"layers\.1"):
        export_decoder(model)
