"""What one forward pass of each tiny model holds: counted in its modules' code, not in what fxfuse finds."""

from __future__ import annotations

from typing import NamedTuple


class Expected(NamedTuple):
    norms: int
    """RMSNorms, those without a weight included."""
    rotations: int
    """Tensors that are rotated."""
    attentions: int
    kv_heads: int
    """Heads of k and v."""
    why: str
    """What this architecture is here for."""
    layer_norms: int = 0
    """LayerNorms that are written out: those of `nn.LayerNorm` are one operator already."""


EXPECTED: dict[str, Expected] = {
    "llama": Expected(5, 4, 2, 2, "the plain case: halves, grouped heads"),
    "mistral": Expected(5, 4, 2, 2, "sliding window"),
    "qwen3": Expected(9, 4, 2, 2, "norms of each head of q and k"),
    "gemma": Expected(5, 4, 2, 2, "(1 + w), weight in float32"),
    "gemma2": Expected(9, 4, 2, 2, "soft-cap, norms after the blocks"),
    "gemma3_text": Expected(13, 4, 2, 2, "two tables of angles, windows between"),
    "olmo2": Expected(9, 4, 2, 2, "norms of q and k before the heads are split"),
    "nanochat": Expected(10, 4, 2, 2, "norms without a weight, sin of the other sign"),
    "granite": Expected(5, 4, 2, 2, "a scale of its own"),
    "helium": Expected(5, 4, 2, 2, "neighbours, the weight in float32"),
    "phi": Expected(0, 4, 2, 2, "part of the head rotated"),
    "phi3": Expected(5, 4, 2, 2, "one projection for q, k and v"),
    "gpt_neox": Expected(0, 4, 2, 4, "part of the head rotated, one projection"),
    "stablelm": Expected(0, 4, 2, 2, "part of the head rotated"),
    "glm": Expected(5, 4, 2, 2, "part of the head, neighbours by repeat_interleave"),
    "cohere2": Expected(0, 4, 2, 2, "neighbours; LayerNorms written out; side by side", 3),
    "codegen": Expected(0, 4, 2, 4, "a table of sin and cos, attention written out"),
    "smollm3": Expected(5, 2, 2, 2, "layers without rotation"),
    "deepseek_v3": Expected(9, 4, 2, 4, "latent attention, neighbours left as halves, experts"),
    "deepseek_v2": Expected(9, 4, 2, 4, "latent attention, complex tables, experts"),
    "llama4_text": Expected(9, 4, 2, 2, "complex tables, L2 norms, chunked attention, experts"),
    "gpt_oss": Expected(5, 4, 2, 2, "sinks, split halves, experts"),
    "mixtral": Expected(5, 4, 2, 2, "experts"),
    "doge": Expected(9, 4, 2, 2, "a mask made of v"),
    "lfm2": Expected(7, 2, 1, 2, "convolutions beside attention"),
    "bamba": Expected(6, 2, 1, 2, "Mamba 2 beside attention, gated norms"),
    "gpt2": Expected(0, 0, 2, 4, "positions that are added, one projection"),
    "bloom": Expected(0, 0, 2, 4, "ALiBi by baddbmm"),
    "gpt_neo": Expected(0, 0, 2, 4, "masks in buffers, no scale"),
}


_ONE_LENGTH = "a loop over the positions in Python: torch.export captures it for the sample's length"
_FIXED = "torch.export makes the sequence static: the model reads its length as a number"
_EXPERTS = "a loop over the experts that were hit: torch.export cannot decide how many there are"

UPSTREAM: dict[str, str] = {
    **dict.fromkeys(("falcon_mamba", "jamba", "mamba", "recurrent_gemma", "rwkv", "xlstm", "zamba"), _ONE_LENGTH),
    **dict.fromkeys(("cpmant", "prophetnet"), _FIXED),
    **dict.fromkeys(("dbrx", "longcat_flash"), _EXPERTS),
    "qwen4_exp_text": "a branch on how many blocks are complete: torch.export cannot decide it",
    "zamba2": "its configuration admits no tiny model: layers are shared by a table of fixed length",
}
"""Architectures that no exporter takes with batch and sequence dynamic, and why."""
