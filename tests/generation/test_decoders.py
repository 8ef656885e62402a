"""Decoders of transformers, tiny and random, through the session: logits of a padded batch, of beams, of every step."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
import transformers

from fxfuse.decoder.description import Layer
from fxfuse.decoder.export import Cache, export_decoder
from fxfuse.errors import FxfuseError
from fxfuse.package.genai import genai_config
from fxfuse.package.manifest import manifest_of
from fxfuse.runtime import EagerSession, Session

WINDOW = 6
TOKENS: dict[str, Any] = {"vocab_size": 96, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
SIZES: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48}
OLDER: dict[str, Any] = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("BloomConfig", {**TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "deepseek_v3": ("DeepseekV3Config", {**GROUPED, **LATENT, **EXPERTS, "num_key_value_heads": 4}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", GROUPED),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}),
    "olmo2": ("Olmo2Config", GROUPED),
    "granite": ("GraniteConfig", GROUPED),
    "stablelm": ("StableLmConfig", GROUPED),
    "falcon": ("FalconConfig", {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "opt": ("OPTConfig", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "gpt_neox": ("GPTNeoXConfig", {**SIZES, "intermediate_size": 48}),
    "gptj": ("GPTJConfig", {**OLDER, "rotary_dim": 4}),
    "cohere": ("CohereConfig", GROUPED),
    "cohere2": ("Cohere2Config", {**GROUPED, "sliding_window": WINDOW}),
    "gpt_oss": ("GptOssConfig", {**GROUPED, "head_dim": 8, "sliding_window": WINDOW, "num_local_experts": 4}),
    "gpt_bigcode": ("GPTBigCodeConfig", OLDER),
}
SAMPLE = {("bloom", "growing"), ("deepseek_v3", "static")}
CELLS = [
    pytest.param(name, cache, marks=() if (name, cache) in SAMPLE else pytest.mark.slow)
    for name in CONFIGS
    for cache in ("growing", "static")
]
STEPS = 10


def build(name: str) -> Any:
    """With weights so large that what is left out shows."""
    torch.manual_seed(0)
    kind, options = CONFIGS[name]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options)).eval()
    for parameter in model.requires_grad_(False).parameters():
        if parameter.dim() > 1:
            parameter.mul_(8)
    return model


@functools.cache
def exported(name: str, cache: Cache) -> ir.Model:
    return export_decoder(build(name), names="genai", cache=cache)


@pytest.mark.parametrize(("name", "cache"), CELLS)
def test_the_session_says_what_the_model_says(name: str, cache: Cache, tmp_path: Path) -> None:
    model = build(name)
    ir.save(exported(name, cache), tmp_path / "model.onnx")
    sessions = [
        EagerSession(model),
        Session(tmp_path / "model.onnx", max_length=24 if cache == "static" else None, threads=1),
    ]
    draw = torch.Generator().manual_seed(1)
    ids, tokens = (torch.randint(2, 96, size, generator=draw) for size in ((3, 9), (STEPS, 3)))
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :8] = 0, 0
    for chunk in (None, 4):
        eager, actual = (run(session, ids, mask, tokens, chunk) for session in sessions)
        scale = eager.abs().amax()
        torch.testing.assert_close(actual / scale, eager / scale, rtol=0, atol=1e-4)
        assert eager.std() > 0.01


def run(session: Any, ids: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor, chunk: int | None) -> torch.Tensor:
    """The logits [1 + STEPS, 3, V]; the rows change places on the way."""
    session.reset()
    logits = [session.prefill(ids, mask, chunk=chunk)]
    for step, token in enumerate(tokens):
        if step == STEPS // 2:
            session.reorder(torch.tensor([2, 0, 0]))
        logits.append(session.step(token))
    return torch.stack(logits)


def test_values_of_another_size_than_the_keys() -> None:
    manifest = manifest_of(exported("deepseek_v3", "static"), "model.onnx", context_length=128, pad=0)
    assert list(manifest.cache.layers) == [Layer(1, 16, value_dim=8)] * 2, "what it caches is latent"
    with pytest.raises(FxfuseError, match="heads of other sizes"):
        genai_config(manifest)
