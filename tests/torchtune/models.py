"""Small instances of every TorchTune family, with inputs, dynamic shapes and the counts they must fuse to.

Every case has two layers and weights that matter: norm scales, biases and gates are drawn at random, so that a
weight that is lost or misplaced shows in the output. What a case must fuse to is not written down but counted, by
forward hooks, in one eager run (:func:`census`).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import nn
from torchtune.models.gemma import gemma
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.models.gemma2 import gemma2
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.models.llama2 import llama2
from torchtune.models.llama3 import llama3
from torchtune.models.llama3_1 import llama3_1
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.mistral import mistral
from torchtune.models.phi3 import phi3
from torchtune.models.phi3._position_embeddings import Phi3RotaryPositionalEmbeddings
from torchtune.models.qwen2 import qwen2
from torchtune.models.qwen2._positional_embeddings import Qwen2RotaryPositionalEmbeddings
from torchtune.models.t5._component_builders import t5_encoder
from torchtune.models.t5._encoder import T5EncoderSelfAttention
from torchtune.modules import (
    MultiHeadAttention,
    RMSNorm,
    RotaryPositionalEmbeddings,
    TanhGate,
    VisionRotaryPositionalEmbeddings,
)
from torchtune.modules.attention_utils import create_block_causal_mask


def _vision_models() -> tuple[ModuleType, ModuleType]:
    """``torchtune.models.clip`` and ``llama3_2_vision``.

    Importing them imports torchvision, for image transforms that no model needs; where torchvision is missing or built
    for another torch, a placeholder stands in for it meanwhile.
    """
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")
    try:
        importlib.import_module("torchvision")
        placeholders: list[str] = []
    except (ImportError, RuntimeError):
        placeholders = [name for name in names if name not in sys.modules]
        sys.modules.update({name: mock.MagicMock(__path__=[]) for name in placeholders})
    try:
        return (
            importlib.import_module("torchtune.models.clip._component_builders"),
            importlib.import_module("torchtune.models.llama3_2_vision._component_builders"),
        )
    finally:
        for name in placeholders:
            del sys.modules[name]


clip_models, vision_models = _vision_models()

NORMS = (RMSNorm, GemmaRMSNorm)
ROTARIES = (
    RotaryPositionalEmbeddings,
    Llama3ScaledRoPE,
    Phi3RotaryPositionalEmbeddings,
    Qwen2RotaryPositionalEmbeddings,
    VisionRotaryPositionalEmbeddings,
)
ATTENTIONS = (MultiHeadAttention, Gemma2Attention, T5EncoderSelfAttention)

VOCAB = 120
MAX_SEQ = 48

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a model's forward."""


@dataclass(frozen=True)
class Case:
    """One small model and the ways to call it."""

    name: str
    build: Callable[[], nn.Module]
    """Makes the model in the current default dtype; weights are still TorchTune's initial ones."""
    make: Callable[[int, int, str, torch.dtype], Inputs]
    """(batch, sequence, variant, dtype of float inputs) -> inputs."""
    variants: tuple[str, ...] = ("plain",)
    sequence: int = 9
    """The sequence length to export at (the only possible one when `dynamic` lacks "seq")."""
    dynamic: tuple[str, ...] = ("batch", "seq")
    """Which of the two the model's own code leaves dynamic."""
    axes: dict[str, dict[int, str]] = field(default_factory=dict)
    """Per input, the dimensions that are batch or sequence."""
    onnx: bool = True
    """Whether torch.onnx can write the rest of the model."""

    def model(self, dtype: torch.dtype = torch.float32, *, cast: bool = False) -> nn.Module:
        """The model in eval mode with random weights.

        In TorchTune's own way the model is built under the default dtype and RoPE caches stay in float32; with `cast`
        it is built in float32 and everything, caches included, goes through ``.to(dtype)``.
        """
        with default_dtype(torch.float32 if cast else dtype):
            torch.manual_seed(0)
            model = self.build()
        randomise(model)
        if cast:
            model = model.to(dtype)
        return model.eval().requires_grad_(False)

    def inputs(
        self, batch: int = 2, seq: int | None = None, variant: str = "plain", dtype: torch.dtype = torch.float32
    ) -> Inputs:
        """The same inputs for the same batch and sequence, whatever the dtype (but for rounding)."""
        torch.manual_seed(1000 * batch + (seq or self.sequence))
        return self.make(batch, seq or self.sequence, variant, dtype)

    def dynamic_shapes(self, inputs: Inputs) -> dict[str, Any]:
        """Dim.DYNAMIC, which unlike Dim.AUTO refuses to become a constant, on every dynamic batch and sequence."""
        args, kwargs = inputs
        names = [*[*self.axes][: len(args)], *kwargs]
        return {
            name: {d: torch.export.Dim.DYNAMIC for d, what in self.axes[name].items() if what in self.dynamic} or None
            for name in names
        }

    def export(self, model: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
        args, kwargs = inputs
        shapes = self.dynamic_shapes(inputs)
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)

    def __str__(self) -> str:
        return self.name


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What ``torchtune.training.set_default_dtype`` does."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def randomise(model: nn.Module) -> None:
    """Weights of a trained model's size, none of them neutral; the same in every dtype but for rounding."""
    generator = torch.Generator().manual_seed(7)

    def normal(shape: torch.Size) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    seen: set[int] = set()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            if isinstance(module, GemmaRMSNorm):
                value = 0.4 * normal(weight.shape)
            elif isinstance(module, RMSNorm) or (isinstance(module, nn.LayerNorm) and name == "weight"):
                value = 1 + 0.4 * normal(weight.shape)
            elif isinstance(module, TanhGate):
                value = 0.6 + 0.2 * normal(weight.shape)
            elif isinstance(module, nn.Linear) and name == "weight":
                value = normal(weight.shape) * 1.5 / weight.shape[-1] ** 0.5
            elif isinstance(module, nn.Embedding):
                value = normal(weight.shape)
            else:
                value = 0.3 * normal(weight.shape)
            weight.data.copy_(value)


@dataclass(frozen=True)
class Census:
    """What one eager run of a model did."""

    counts: dict[str, int]
    """Calls of norm, rotary and attention modules, under the names of the ONNX operators."""
    kv_heads: tuple[int, ...]
    """The number of key and value heads of each attention, in order of the calls."""


def census(model: nn.Module, inputs: Inputs) -> Census:
    counts = {"RMSNormalization": 0, "RotaryEmbedding": 0, "Attention": 0}
    kv_heads: list[int] = []

    def hook(kind: str) -> Callable[..., None]:
        def count(module: nn.Module, args: Any, output: Any) -> None:
            counts[kind] += 1
            if kind == "Attention":
                kv_heads.append(getattr(module, "num_kv_heads", None) or module.num_heads)

        return count

    kinds = {"RMSNormalization": NORMS, "RotaryEmbedding": ROTARIES, "Attention": ATTENTIONS}
    handles = [
        module.register_forward_hook(hook(kind))
        for module in model.modules()
        for kind, classes in kinds.items()
        if isinstance(module, classes)
    ]
    try:
        with torch.no_grad():
            model(*inputs[0], **inputs[1])
    finally:
        for handle in handles:
            handle.remove()
    return Census(counts, tuple(kv_heads))


# ---- inputs

TEXT_AXES = {
    "tokens": {0: "batch", 1: "seq"},
    "mask": {0: "batch", 1: "seq", 2: "seq"},
    "input_pos": {0: "batch", 1: "seq"},
    "encoder_input": {0: "batch", 1: "seq"},  # a length of its own that grows with the text's
    "encoder_mask": {0: "batch", 1: "seq", 2: "seq"},
}
TEXT_VARIANTS = ("plain", "input_pos", "mask", "packed")


def seq_lens(batch: int, seq: int) -> list[torch.Tensor]:
    """Lengths of packed samples, different from pack to pack, together `seq`."""
    packs = []
    for i in range(batch):
        ends = sorted({1 + i % 3, seq // 2 + 1 + i % 2, seq})
        packs.append(torch.tensor([end - start for start, end in zip([0, *ends], ends, strict=False)]))
    return packs


def text(batch: int, seq: int, variant: str, dtype: torch.dtype) -> Inputs:
    """Tokens, and per variant: positions that are no plain range, an irregular mask, or a packed-sample mask."""
    tokens = torch.randint(0, VOCAB, (batch, seq))
    if variant == "plain":
        return (tokens,), {}
    if variant == "input_pos":  # gaps of one to three: a shift alone would not change the output
        return (tokens,), {"input_pos": torch.randint(1, 4, (batch, seq)).cumsum(1)}
    if variant == "mask":
        causal = torch.ones(seq, seq, dtype=torch.bool).tril()
        mask = (causal & (torch.rand(batch, seq, seq) > 0.3)) | torch.eye(seq, dtype=torch.bool)
        mask[:, 0, seq - 1] = True  # not causal
        return (tokens,), {"mask": mask}
    if variant == "packed":
        lens = seq_lens(batch, seq)
        positions = torch.stack([torch.cat([torch.arange(int(n)) for n in pack]) for pack in lens])
        return (tokens,), {"mask": create_block_causal_mask(lens), "input_pos": positions}
    raise ValueError(variant)


def clip_text(batch: int, seq: int, variant: str, dtype: torch.dtype) -> Inputs:
    (tokens,), kwargs = text(batch, seq, variant, dtype)
    tokens[torch.arange(batch), seq - 2 - torch.arange(batch) % 3] = VOCAB - 1  # the end-of-text token
    return (tokens,), kwargs


def vision_text(batch: int, seq: int, variant: str, dtype: torch.dtype) -> Inputs:
    """As `text`; "cross" adds embeddings of images, "cross_mask" also a mask with rows that attend to nothing."""
    if not variant.startswith("cross"):
        (tokens,), kwargs = text(batch, seq, variant, dtype)
        tokens[:, 1] = VOCAB + torch.arange(batch) % 8  # a special token, from the second embedding table
        return (tokens,), kwargs
    args, kwargs = vision_text(batch, seq, "plain", dtype)
    kwargs["encoder_input"] = torch.randn(batch, seq - 2, 64).to(dtype)
    if variant == "cross_mask":
        kwargs["encoder_mask"] = torch.rand(batch, seq, seq - 2) > 0.4
        kwargs["encoder_mask"][:, 1] = False
    return args, kwargs


def images(tiles: int) -> Callable[[int, int, str, torch.dtype], Inputs]:
    def make(batch: int, seq: int, variant: str, dtype: torch.dtype) -> Inputs:
        pixels = torch.randn(batch, 1, tiles, 3, 24, 24).to(dtype)
        return (pixels, torch.tensor([[[tiles, 1]]]).repeat(batch, 1, 1)), {}

    return make


IMAGE_AXES = {"images": {0: "batch"}, "aspect_ratio": {0: "batch"}}


# ---- models

TEXT: dict[str, Any] = {"vocab_size": VOCAB, "num_layers": 2, "embed_dim": 64, "max_seq_len": MAX_SEQ}
GQA: dict[str, Any] = {**TEXT, "num_heads": 4, "num_kv_heads": 2}
MLP: dict[str, Any] = {"intermediate_dim": 96}
CLIP: dict[str, Any] = {"tile_size": 24, "patch_size": 8, "embed_dim": 64, "num_layers": 2, "num_heads": 4}


def decoder(name: str, builder: Callable[..., nn.Module], **options: Any) -> Case:
    return Case(name, lambda: builder(**options), text, TEXT_VARIANTS, axes=TEXT_AXES)


def tiny_t5() -> nn.Module:
    return t5_encoder(
        embed_dim=64,
        mlp_dim=96,
        num_heads=4,
        head_dim=16,
        num_layers=2,
        rel_pos_num_buckets=8,
        rel_pos_max_dist=6,
        vocab_size=VOCAB,
        norm_eps=1e-6,
        max_seq_len=9,
    )


def tiny_clip_text() -> nn.Module:
    model = clip_models.clip_text_encoder(embed_dim=64, num_heads=4, num_layers=2, vocab_size=VOCAB, max_seq_len=9)
    model.eot_token = VOCAB - 1  # the builder has no option for it
    return model


class ClipTextStates(nn.Module):
    """The CLIP text encoder up to its pooling, whose ``take_along_dim`` makes the batch a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = tiny_clip_text()

    def forward(self, tokens: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.encoder.token_embedding(tokens) + self.encoder.position_embedding
        for layer in self.encoder.layers:
            x = layer(x, mask=mask)
        return self.encoder.final_norm(x)


def tiny_vision_decoder() -> nn.Module:
    return vision_models.llama3_2_vision_decoder(
        **GQA, **MLP, fusion_interval=2, num_special_tokens=8, encoder_max_seq_len=MAX_SEQ
    )


def tiny_vision_decoder_one_table() -> nn.Module:
    """The same decoder with one embedding table for all tokens, since torch.onnx cannot write `FusionEmbedding`."""
    model = tiny_vision_decoder()
    model.tok_embeddings = nn.Embedding(VOCAB + 8, TEXT["embed_dim"])
    return model


def tiny_vision_encoder(max_num_tiles: int) -> nn.Module:
    return vision_models.llama3_2_vision_encoder(
        patch_size=8,
        num_heads=4,
        clip_embed_dim=64,
        clip_num_layers=2,
        clip_hidden_states=[0, 1],
        num_layers_projection=2,
        decoder_embed_dim=48,
        tile_size=24,
        max_num_tiles=max_num_tiles,
    )


def clip_vision(name: str, tiles: int, **options: Any) -> Case:
    """A CLIP vision encoder with rotary embeddings in both image directions, without embeddings of tiles."""

    def build() -> nn.Module:
        return clip_models.clip_vision_encoder(
            **CLIP, use_rope=True, use_tile_pos_embed=False, max_num_tiles=tiles, **options
        )

    return Case(name, build, images(tiles), dynamic=("batch",), axes=IMAGE_AXES)


# A softmax of scores under a small soft-cap and a window shorter than every tested sequence.
GEMMA2: dict[str, Any] = {"hidden_capping_value": 4.0, "sliding_window_size": 4, "query_pre_attn_scalar": 20}

CASES: tuple[Case, ...] = (
    decoder("llama2", llama2, **{**GQA, "num_kv_heads": 4}),
    decoder("llama3", llama3, **GQA, **MLP),
    decoder("llama3_1", llama3_1, **GQA, **MLP),
    decoder("llama3_2", llama3_2, **GQA, **MLP),
    decoder("mistral", mistral, **GQA, **MLP),
    decoder("gemma", gemma, **{**GQA, "num_kv_heads": 1}, **MLP, head_dim=24),
    decoder("gemma2", gemma2, **GQA, **MLP, **GEMMA2, head_dim=24),
    decoder("phi3", phi3, **{**GQA, "num_kv_heads": 4}, **MLP),
    decoder("phi4", phi3, **GQA, **MLP, rope_base=250_000),  # phi4's builder is phi3's with grouped queries
    decoder("qwen2", qwen2, **GQA, **MLP, tie_word_embeddings=True),
    decoder("qwen2_5", qwen2, **{**GQA, "num_heads": 8}, **MLP),  # qwen2_5's builders call qwen2's
    Case("t5_encoder", tiny_t5, text, axes=TEXT_AXES, dynamic=("batch",)),
    Case("clip_text", tiny_clip_text, clip_text, ("plain", "mask"), axes=TEXT_AXES, dynamic=()),
    Case("clip_text_states", ClipTextStates, clip_text, ("plain", "mask"), axes=TEXT_AXES, dynamic=("batch",)),
    clip_vision("clip_vision_rope", 2),
    clip_vision("clip_vision_rope_cls", 1, append_cls_token=True),
    Case(
        "llama3_2_vision_decoder",
        tiny_vision_decoder,
        vision_text,
        ("plain", "cross"),
        axes=TEXT_AXES,
        onnx=False,
    ),
    Case(
        "llama3_2_vision_decoder_one_table",
        tiny_vision_decoder_one_table,
        vision_text,
        (*TEXT_VARIANTS, "cross", "cross_mask"),
        axes=TEXT_AXES,
    ),
    Case(
        "llama3_2_vision_encoder",
        lambda: tiny_vision_encoder(max_num_tiles=1),
        images(1),
        axes=IMAGE_AXES,
        dynamic=("batch",),
    ),
)

# What TorchTune's or torch's own code keeps from being exported, and what torch.export says of it.
UNREACHABLE: tuple[tuple[Case, str, str], ...] = (
    (
        Case("t5_encoder", tiny_t5, text, axes=TEXT_AXES),
        "the bias of relative positions has max_seq_len rows and columns and is added to every score",
        r"tokens'\].size\(\)\[1\].* specialized it to be a constant \(9\)",
    ),
    (
        Case("clip_text", tiny_clip_text, clip_text, axes=TEXT_AXES, dynamic=("batch",)),
        "torch's take_along_dim makes the batch a constant",
        r"tokens'\].size\(\)\[0\].* specialized it to be a constant \(2\)",
    ),
    (
        Case("clip_text_states", ClipTextStates, clip_text, axes=TEXT_AXES),
        "the position embedding has max_seq_len rows and is added whole",
        r"tokens'\].size\(\)\[1\].* specialized it to be a constant \(9\)",
    ),
    (
        Case(
            "llama3_2_vision_encoder",
            lambda: tiny_vision_encoder(max_num_tiles=4),
            images(2),
            axes=IMAGE_AXES,
            dynamic=("batch",),
        ),
        "the embeddings of tiles loop over the values of aspect_ratio",
        "data-dependent expression",
    ),
)
