"""Tiny models of transformers' decoder architectures, from their own configurations; nothing is downloaded."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, HEADS, KV_HEADS, SIZE = 256, 64, 4, 2, 16

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": SIZE,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": HEADS,
    "encoder_attention_heads": HEADS,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "ffn_dim": 96,
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""By the names that configurations use; each takes those it has."""

_LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": HEADS,
    "head_dim": 8,
}
"""Multi-head latent attention: v has another head size than q and k."""

_LATENT_ARCHITECTURES = (
    *("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text"),
    *("glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "longcat_flash", "minicpm3", "youtu"),
)

SPECIAL: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 8},
    **dict.fromkeys(_LATENT_ARCHITECTURES, _LATENT),
    "gptj": {"rotary_dim": 8},
    "hy_v4": {"qk_rope_head_dim": 8},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        },
    },
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1},
    "nemotron_h": {"n_groups": 1, "mamba_num_heads": 4, "mamba_head_dim": 32},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": WIDTH},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"]},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {"no_rope_layers": [1, 0]},
    "llama4_text": {"intermediate_size_mlp": 96, "layer_types": ["chunked_attention", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
}


def configuration(arch: str, **changes: Any) -> Any:
    """The architecture's own configuration class, with small sizes, and with these changes.

    Raises:
        KeyError: transformers knows no such architecture.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[arch]
    known = set(getattr(kind, "__dataclass_fields__", ())) | set(inspect.signature(kind.__init__).parameters)
    aliases = getattr(kind, "attribute_map", {})
    values: dict[str, Any] = {}
    for name, value in {**SMALL, **SPECIAL.get(arch, {})}.items():
        own = aliases.get(name, name)
        if name in SPECIAL.get(arch, {}) or own in known or name in known:
            values[own] = value
    config = kind(**{**values, **changes})
    config.use_cache = False
    if "is_decoder" in known:
        config.is_decoder = True
    return config


def build(arch: str, *, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A causal language model in evaluation mode, its weights spread so that every part moves the logits."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = configuration(arch, **changes)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except ValueError:  # it has no SDPA: the one way it is written
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    spread(model)
    model.eval().to(dtype)
    return Logits(model).eval()


def spread(model: nn.Module) -> None:
    """Give the model weights large enough that a wrong norm, rotation or head moves what it returns."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2 or "norm" in name.lower():
                parameter.add_(0.1 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(0.5 * noise)
            else:
                read = parameter[0].numel() if parameter.dim() > 3 else parameter.shape[-1]  # convolutions of images
                parameter.copy_(noise * read**-0.5)


class Logits(nn.Module):
    """``input_ids [B, S]``, and a padding mask and positions where they are given, to ``logits [B, S, V]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        logits: Tensor = self.model(
            input_ids=input_ids, use_cache=False, **{k: v for k, v in given.items() if v is not None}
        ).logits
        return logits


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(batch: int, length: int, side: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions; the first row has three tokens of padding on the left or the right."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, slice(0, 3) if side == "left" else slice(-3, None)] = 0
    return tokens(batch, length, seed), mask, (mask.cumsum(-1) - 1).clamp(min=0)
