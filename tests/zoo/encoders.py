"""Tiny models of transformers' encoders of text, images and sound, from their own configurations; nothing is
downloaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .models import SMALL, VOCABULARY, WIDTH, spread, tokens

KINDS = {
    "text": "input_ids",
    "images": "pixel_values",
    "sound": "input_values",
    "features": "input_features",
}
"""What an encoder reads, and the name of that input in transformers."""

_SMALL: dict[str, Any] = {
    **{k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
    "num_key_value_heads": SMALL["num_attention_heads"],
    "embedding_size": WIDTH,
    "global_attn_every_n_layers": 2,
    "local_attention": 8,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
    "num_frames": 2,
    "tubelet_size": 1,
    "num_mel_bins": 16,
    "max_source_positions": 32,
    "conv_dim": (32, 32),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}

SPECIAL: dict[str, dict[str, Any]] = {
    "bart": {"d_model": WIDTH},
    "mbart": {"d_model": WIDTH},
    "mvp": {"d_model": WIDTH},
    "xmod": {"default_language": "en_XX"},
    "reformer": {"axial_pos_embds": False, "is_decoder": False},
    "squeezebert": {"embedding_size": WIDTH},
    "mobilebert": {"true_hidden_size": WIDTH, "intra_bottleneck_size": WIDTH, "embedding_size": 32},
    "roc_bert": {"pronunciation_vocab_size": 32, "shape_vocab_size": 32},
}


def architectures(kind: str) -> list[str]:
    """Those whose configuration holds no other configurations: masked language models, and towers of one input."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_MAPPING,
        MODEL_MAPPING_NAMES,
    )

    names = MODEL_FOR_MASKED_LM_MAPPING_NAMES if kind == "text" else MODEL_MAPPING_NAMES
    found = []
    for arch in names:
        config = CONFIG_MAPPING[arch]
        if getattr(config, "sub_configs", None) and kind != "text":
            continue
        if kind == "text":
            found.append(arch)
            continue
        try:
            model = MODEL_MAPPING[config]
        except (AttributeError, ValueError, KeyError):  # transformers names a class that it does not have
            continue
        model = model[0] if isinstance(model, tuple) else model
        if getattr(model, "main_input_name", None) == KINDS[kind]:
            found.append(arch)
    return found


def configuration(arch: str) -> Any:
    """The architecture's own configuration class, with small sizes where it takes them."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[arch]
    known = set(getattr(kind, "__dataclass_fields__", ())) | set(inspect.signature(kind.__init__).parameters)
    aliases: Mapping[str, str] = getattr(kind, "attribute_map", {})
    defaults = kind()
    values: dict[str, Any] = {}
    for name, value in _SMALL.items():
        own = aliases.get(name, name)
        if own not in known and name not in known:
            continue
        if isinstance(getattr(defaults, own, None), list | tuple) and not isinstance(value, list | tuple):
            continue  # one number a stage: a model of stages keeps its own
        values[own] = value
    config = kind(**{**values, **SPECIAL.get(arch, {})})
    config.use_cache = False
    return config


def build(arch: str, kind: str, *, attention: str = "sdpa") -> nn.Module:
    """An encoder in evaluation mode, its weights spread so that every part moves what it returns.

    Raises:
        ValueError: its configuration admits no model of less than 60 million weights.
    """
    from transformers import AutoModel, AutoModelForMaskedLM

    torch.manual_seed(0)
    config = configuration(arch)
    auto = AutoModelForMaskedLM if kind == "text" else AutoModel
    try:
        model = auto.from_config(config, attn_implementation=attention)
    except ValueError:  # it has no SDPA: the one way it is written
        model = auto.from_config(config, attn_implementation="eager")
    if sum(p.numel() for p in model.parameters()) > 60_000_000:
        raise ValueError("its configuration admits no tiny model")
    if getattr(model.config, "is_encoder_decoder", False) and kind != "text":
        model = model.get_encoder()
    spread(model)
    return First(model, KINDS[kind]).eval()


class First(nn.Module):
    """The model as a function of its one input, to its first output (`logits`, or `last_hidden_state`)."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x: Tensor) -> Tensor:
        result = self.model(**{self.name: x}, return_dict=True)
        first: Tensor = next(v for v in result.values() if isinstance(v, Tensor))
        return first


def sample(model: nn.Module, kind: str, batch: int, length: int) -> Tensor:
    """One input: `[B, S]` ids, `[B, C, H, W]` images, `[B, samples]` of sound, or `[B, mel bins, frames]`."""
    config: Any = model.model.config  # type: ignore[union-attr]
    if kind == "text":
        return tokens(batch, length, seed=length).clamp(max=min(VOCABULARY, getattr(config, "vocab_size", 256)) - 1)
    generator = torch.Generator().manual_seed(length)
    if kind == "images":
        size = getattr(config, "image_size", 32) or 32
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape: tuple[int, ...] = (batch, getattr(config, "num_channels", 3), height, width)
        if hasattr(config, "num_frames"):
            shape = (batch, config.num_frames, *shape[1:])
    elif kind == "sound":
        shape = (batch, 40 * length)
    else:
        shape = (batch, getattr(config, "num_mel_bins", 16), 64)
    return torch.randn(shape, generator=generator)
