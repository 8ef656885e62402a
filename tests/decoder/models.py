"""Small decoders of transformers, and a greedy decoding in ONNX Runtime to hold against `forward` without any cache."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, Phi3Config, Qwen3Config

_TOKENS: dict[str, Any] = {"vocab_size": 64, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
_SIZES: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**_SIZES),
    "gpt2": GPT2Config(**_TOKENS, n_embd=32, n_layer=2, n_head=4),
    "qwen3": Qwen3Config(**_SIZES, head_dim=8),
    "phi3": Phi3Config(**_SIZES),
    "gemma3": Gemma3TextConfig(
        **_SIZES, head_dim=8, layer_types=["sliding_attention", "full_attention"], sliding_window=4
    ),
}
PROMPT = torch.tensor([[0, 0, 5, 9, 21], [7, 3, 44, 12, 60]])
PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def build(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def expected(model: Any, ids: torch.Tensor, mask: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens [B, steps] that the model decodes greedily without a cache, and their logits [B, steps, V]."""
    logits = []
    for _ in range(steps):
        last = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits[:, -1]
        logits.append(last)
        ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids[:, -steps:], torch.stack(logits, 1)


class Decoder:
    """A decoder's graph in ONNX Runtime: its cache grows, or has `length` slots."""

    def __init__(self, program: ir.Model, folder: Path, length: int | None = None) -> None:
        ir.save(program, folder / "model.onnx")
        self.session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        self.length = length
        self.cache: dict[str, np.ndarray] = {}

    def start(self, batch: int) -> None:
        for value in self.session.get_inputs():
            if value.name.startswith("past_key_values."):
                shape = (batch, value.shape[1], self.length or 0, value.shape[3])
                # What no token was written to must not be seen, whatever is there.
                self.cache[value.name] = np.full(shape, 1e4 if self.length else 0, np.float32)

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The logits [B, S, V] of new tokens [B, S], given the mask of all [B, P + S]."""
        S = ids.shape[1]
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)[:, -S:]}
        names = {value.name for value in self.session.get_inputs()}
        inputs = {name: tensor.numpy() for name, tensor in feeds.items() if name in names}
        outputs = [value.name for value in self.session.get_outputs()]
        results = dict(zip(outputs, self.session.run(outputs, inputs | self.cache), strict=True))
        self.cache = {name: results[name.replace("past_key_values", "present")] for name in self.cache}
        return torch.from_numpy(results["logits"])

    def greedy(
        self, ids: torch.Tensor, mask: torch.Tensor, steps: int, chunk: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `expected`; the prompt is fed `chunk` tokens at a time."""
        self.start(ids.shape[0])
        chunk = chunk or ids.shape[1]
        for begin in range(0, ids.shape[1], chunk):
            end = min(begin + chunk, ids.shape[1])
            last = self(ids[:, begin:end], mask[:, :end])[:, -1]
        logits = [last]
        for _ in range(steps - 1):
            ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            last = self(ids[:, -1:], mask)[:, -1]
            logits.append(last)
        stacked = torch.stack(logits, 1)
        return stacked.argmax(-1), stacked


def operators(program: ir.Model) -> list[str]:
    return [node.op_type for node in program.graph.all_nodes()]
