"""Small checkpoints, and how they come to be broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
DECODER: dict[str, Any] = {**TEXT, "num_key_value_heads": 2, "bos_token_id": 3, "eos_token_id": 1}
IMAGES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
T5: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


def save(name: str, folder: Path, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    """The checkpoint of a class of transformers by its name, random, as `save_pretrained` writes it."""
    cls = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cls(cls.config_class(**options)).to(dtype).save_pretrained(folder)
    return folder


def configured(name: str, folder: Path, options: dict[str, Any], **more: Any) -> Path:
    """The config.json alone, of the class of that name."""
    config = getattr(transformers, name).config_class(**options)
    config.architectures = [name]
    config.save_pretrained(folder)
    change_config(folder, **more)
    return folder


def copied(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any] | None = None) -> Path:
    """The checkpoint again, with its weights changed."""
    shutil.copytree(source, folder)
    if change is not None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change_config(folder: Path, **fields: Any) -> Path:
    """config.json with these fields; None takes one out."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder
