"""Tiny models that mean something: trained for seconds on the licence, so that argmax has margins.

With random weights greedy decoding soon repeats one token, and a wrong cache may go unseen; these know their text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy

TEXT = Path(__file__).parent.parent.parent / "LICENSE"
VOCABULARY, PAD, EOS = 384, 0, 1
WINDOW = 24
"""Of sliding layers: shorter than what is generated."""
PROMPTS = ("You may reproduce and distribute copies of the Work", "Subject to the terms", "License")

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 128}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 16}),
    "phi3": ("Phi3Config", GROUPED),
    "gpt2": ("GPT2Config", {**SIZES, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **GROUPED,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": WINDOW,
        },
    ),
}
TORCHTUNE = {"vocab_size": VOCABULARY, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64}
BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "tune_llama3_2": ("llama3_2.llama3_2", {**TORCHTUNE, "max_seq_len": 512, "intermediate_dim": 128}),
    "tune_qwen2": ("qwen2.qwen2", {**TORCHTUNE, "max_seq_len": 512, "intermediate_dim": 128}),
    "tune_gemma2": (
        "gemma2.gemma2",
        {**TORCHTUNE, "head_dim": 16, "max_seq_len": 512, "intermediate_dim": 128, "sliding_window_size": WINDOW},
    ),
}


@functools.cache
def tokenizer() -> Tokenizer:
    """Pairs of bytes, learnt from the text itself."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>"]
    made.train_from_iterator([TEXT.read_text()], trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special))
    return made


@functools.cache
def trained(name: str) -> Any:
    """The model of that name, which has learnt the text; the same one at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in CONFIGS:
            import transformers

            kind, options = CONFIGS[name]
            model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options))
            train(model, lambda ids: model(input_ids=ids, use_cache=False).logits)
        else:
            from fxfuse.cli.torchtune import find

            builder, options = BUILDERS[name]
            model = find(builder)[0](**options)
            train(model, model)
    return model.eval().requires_grad_(False)


def train(model: torch.nn.Module, logits: Callable[[torch.Tensor], torch.Tensor], steps: int = 400) -> float:
    """Learns the text by heart, about as fast on one core as it is read; returns the last loss."""
    ids = torch.tensor(tokenizer().encode(TEXT.read_text()).ids)
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - 97, (8,), generator=draw).tolist()
        batch = torch.stack([ids[start : start + 97] for start in starts])
        loss = cross_entropy(logits(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return loss.item()


def save(name: str, folder: Path) -> Path:
    """The checkpoint and the tokenizer, as transformers writes and reads them; torchtune has no such checkpoints."""
    from transformers import PreTrainedTokenizerFast

    if name in CONFIGS:
        trained(name).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer(), pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return folder


def facts(name: str) -> dict[str, Any]:
    """What a manifest says of the model beside its graphs."""
    from fxfuse.package import write as package

    if name in CONFIGS:
        return package.facts(trained(name).config)
    return {"context_length": 512, "hidden_size": 64, "heads": 4, "pad": PAD, "eos": [EOS]}


@torch.no_grad()
def continued(name: str, prompt: list[int], new: int) -> list[int]:
    """What the model itself says greedily: the whole text read again for every token, no cache and no padding."""
    model, ids = trained(name), list(prompt)
    for _ in range(new):
        batch = torch.tensor([ids])
        logits = model(input_ids=batch, use_cache=False).logits if name in CONFIGS else model(batch)
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]
