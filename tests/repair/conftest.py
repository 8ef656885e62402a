"""Files as people have them: real small models through plain ``torch.onnx.export``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torchtune.models.llama3_2 import llama3_2
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 100
SHAPES = {"tokens": {0: "batch", 1: "sequence"}}


class Exported(NamedTuple):
    model: nn.Module
    path: Path


class Logits(nn.Module):
    """A model of transformers as most exports wrap it: ids in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


def torchtune_llama(dtype: torch.dtype, kv_heads: int = 2) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        model: nn.Module = llama3_2(
            vocab_size=VOCABULARY,
            num_layers=2,
            num_heads=4,
            num_kv_heads=kv_heads,
            embed_dim=32,
            max_seq_len=64,
            intermediate_dim=48,
        )
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def transformers_llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="sdpa",
    )
    return Logits(LlamaForCausalLM(config)).eval()


def export(model: nn.Module, path: Path, opset: int = 23) -> Exported:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    tokens = torch.randint(0, VOCABULARY, (2, 8))
    program = torch.onnx.export(
        model, (tokens,), dynamo=True, opset_version=opset, dynamic_shapes=SHAPES, verbose=False
    )
    assert program is not None
    program.save(path, external_data=True)
    return Exported(model, path)


@pytest.fixture(scope="session")
def rotary(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """RoPE fused by the exporter, with cos and sin of batch 1; keys and values repeated."""
    return export(transformers_llama(), tmp_path_factory.mktemp("rotary") / "model.onnx")


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """float16, its norms in float32 with a float16 scale."""
    return export(torchtune_llama(torch.float16), tmp_path_factory.mktemp("mixed") / "model.onnx")


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """As many key heads as query heads, one type."""
    return export(torchtune_llama(torch.float32, kv_heads=4), tmp_path_factory.mktemp("healthy") / "model.onnx")
