"""Sinks and a window, against eager loops over the layers that keep keys before their rotation, token by token."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fxfuse.decoder.export import export_decoder
from fxfuse.errors import FxfuseError
from tests.decoder import test_torchtune
from tests.decoder.models import build

SINKS, WINDOW = 2, 5
SIZE = SINKS + WINDOW
Kept = list[tuple[torch.Tensor, torch.Tensor]]


@cache
def exported(name: str) -> tuple[Any, ir.Model]:
    model = test_torchtune.build(name) if name == "llama3_2" else build(name)
    return model, export_decoder(model, cache="streaming", sinks=SINKS, window=WINDOW)


def evict(kept: torch.Tensor, sinks: int = SINKS, window: int = WINDOW) -> torch.Tensor:
    """The sinks and the last W of [B, H, P, D]."""
    return kept if kept.shape[2] <= sinks + window else torch.cat([kept[:, :, :sinks], kept[:, :, -window:]], 2)


def llama_step(model: Any, token: torch.Tensor, kept: Kept, sinks: int = SINKS, window: int = WINDOW) -> torch.Tensor:
    """Logits [B, V] of one token [B, 1]: transformers' modules, the keys rotated by their places in what is kept."""
    x = model.model.embed_tokens(token)
    for i, layer in enumerate(model.model.layers):
        attention, y = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (
            f(y).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for f in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):  # Qwen 3
            q, k = attention.q_norm(q), attention.k_norm(k)
        k, v = (evict(torch.cat([old, new], 2), sinks, window) for old, new in zip(kept[i], (k, v), strict=True))
        kept[i] = k, v
        cos, sin = model.model.rotary_emb(v, torch.arange(k.shape[2])[None])
        k = apply_rotary_pos_emb(k, k, cos, sin)[1]
        q = apply_rotary_pos_emb(q, q, cos[:, -1:], sin[:, -1:])[0]
        y = scaled_dot_product_attention(q, k, v, scale=attention.scaling, enable_gqa=True)
        x = x + attention.o_proj(y.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x))[:, 0]


def torchtune_step(model: Any, token: torch.Tensor, kept: Kept) -> torch.Tensor:
    """The same of torchtune's modules."""
    x = model.tok_embeddings(token)
    for i, layer in enumerate(model.layers):
        attention, y = layer.attn, layer.sa_norm(x)
        q, k, v = (
            f(y).unflatten(-1, (-1, attention.head_dim)) for f in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        k, v = (evict(torch.cat([old, n.transpose(1, 2)], 2)) for old, n in zip(kept[i], (k, v), strict=True))
        kept[i] = k, v
        places = torch.arange(k.shape[2])[None]
        k = attention.pos_embeddings(k.transpose(1, 2), input_pos=places).transpose(1, 2)
        q = attention.pos_embeddings(q, input_pos=places[:, -1:]).transpose(1, 2)
        y = scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + attention.output_proj(y.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.mlp_norm(x))
    return model.output(model.norm(x))[:, 0]


@torch.no_grad()
def expected(name: str, ids: torch.Tensor) -> torch.Tensor:
    """The logits [B, S, V] of tokens read one by one."""
    model, _ = exported(name)
    step = torchtune_step if name == "llama3_2" else llama_step
    empty = torch.zeros(len(ids), 2, 0, 8)
    kept: Kept = [(empty, empty)] * 2
    return torch.stack([step(model, token, kept) for token in ids.split(1, 1)], 1)


class Reader:
    """The graph in ONNX Runtime; whatever is in slots that no token was written to must not be seen.

    Single tokens are read by `step`, where there is one.
    """

    def __init__(self, program: ir.Model, folder: Path, batch: int, step: ir.Model | None = None) -> None:
        ir.save(program, folder / "model.onnx")
        self.session = self.step = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        if step is not None:
            ir.save(step, folder / "step.onnx")
            self.step = ort.InferenceSession(folder / "step.onnx", providers=["CPUExecutionProvider"])
        pasts = [value for value in self.session.get_inputs() if value.name.startswith("past_key_values.")]
        self.cache = {value.name: np.full((batch, *value.shape[1:]), 1e4, np.float32) for value in pasts}
        self.read = np.zeros((batch, 1), np.int64)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        feeds = {"input_ids": ids.numpy(), "position_ids": self.read + np.arange(ids.shape[1])}
        session = self.step if ids.shape[1] == 1 else self.session
        outputs = [value.name for value in session.get_outputs()]
        results = dict(zip(outputs, session.run(outputs, feeds | self.cache), strict=True))
        for name, old in self.cache.items():
            new = results[name.replace("past_key_values", "present")]
            assert new.shape == old.shape == (len(ids), 2, SIZE, 8)
            self.cache[name] = new
        self.read = self.read + ids.shape[1]
        return torch.from_numpy(results["logits"])


def tokens(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("name", ["llama", "llama3_2", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_far_beyond_the_cache(name: str, tmp_path: Path) -> None:
    """Token by token, beyond what torchtune's table has places for (64); what still fits is as the model gives it."""
    model, program = exported(name)
    ids = tokens(80)
    reader = Reader(program, tmp_path, 2)
    ours = torch.cat([reader(token) for token in ids.split(1, 1)], 1)
    torch.testing.assert_close(ours, expected(name, ids), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        whole = model(ids[:, :60])
    whole = whole if name == "llama3_2" else whole.logits
    torch.testing.assert_close(ours[:, :SIZE], whole[:, :SIZE], atol=1e-5, rtol=1e-5)
    assert (ours[:, 20:60] - whole[:, 20:]).abs().max() > 1e-2


@pytest.mark.parametrize("length", [1, SINKS, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE])
def test_prompts_whole_and_in_chunks(length: int, tmp_path: Path) -> None:
    """What a prompt's tokens give does not depend on how many are read at a time."""
    _, program = exported("llama")
    ids = tokens(length + 8)
    reference = expected("llama", ids)
    for chunk in (length, 3):
        reader = Reader(program, tmp_path, 2)
        parts = [*ids[:, :length].split(chunk, 1), *ids[:, length:].split(1, 1)]
        ours = torch.cat([reader(part) for part in parts], 1)
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)


def test_rows_of_different_lengths(tmp_path: Path) -> None:
    """One has read little and the other more than is kept; then both go on in one batch."""
    _, program = exported("llama")
    ids = tokens(20)
    lengths = (3, 11)
    rows = []
    for row, length in enumerate(lengths):
        rows.append(Reader(program, tmp_path, 1))
        rows[row](ids[row : row + 1, :length])
    both = Reader(program, tmp_path, 2)
    both.cache = {name: np.concatenate([row.cache[name] for row in rows]) for name in both.cache}
    both.read = np.array(lengths)[:, None]
    more = torch.stack([ids[row, length : length + 8] for row, length in enumerate(lengths)])
    ours = torch.cat([both(part) for part in more.split(4, 1)], 1)
    reference = expected("llama", ids)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(ours[row], reference[row, length : length + 8], atol=1e-5, rtol=1e-5)


def test_input_and_output_may_share_their_memory(tmp_path: Path) -> None:
    """As the metadata says."""
    _, program = exported("llama")
    about = json.loads(program.metadata_props["fxfuse.state"])
    assert (about["form"], about["max_length"], about["sinks"], about["window"]) == ("streaming", SIZE, SINKS, WINDOW)
    assert [value.name for value in program.graph.inputs][:2] == ["input_ids", "position_ids"]
    ids = tokens(24)
    reader = Reader(program, tmp_path, 2)
    buffers = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in reader.cache.items()}
    assert len(about["aliases"]) == len(buffers) == 4
    parts = []
    for begin in range(0, 24, 2):
        binding = reader.session.io_binding()
        binding.bind_cpu_input("input_ids", ids[:, begin : begin + 2].contiguous().numpy())
        binding.bind_cpu_input("position_ids", np.tile(np.arange(begin, begin + 2), (2, 1)))
        for output, name in about["aliases"].items():
            binding.bind_ortvalue_input(name, buffers[name])
            binding.bind_ortvalue_output(output, buffers[name])
        binding.bind_output("logits")
        reader.session.run_with_iobinding(binding)
        parts.append(torch.from_numpy(binding.get_outputs()[-1].numpy()))
    torch.testing.assert_close(torch.cat(parts, 1), expected("llama", ids), atol=1e-5, rtol=1e-5)


def test_without_sinks(tmp_path: Path) -> None:
    """Then the keys that are seen, and their distances, are those of a window: of one layer, the model's own mask."""
    model = build("llama")
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    program = export_decoder(model, cache="streaming", sinks=0, window=SIZE)
    ids = tokens(20)
    distance = torch.arange(20)[:, None] - torch.arange(20)
    mask = ((distance >= 0) & (distance < SIZE))[None, None].expand(2, -1, -1, -1)
    with torch.no_grad():
        windowed = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(Reader(program, tmp_path, 2)(ids), windowed, atol=1e-5, rtol=1e-5)


class Squares(torch.nn.Module):
    """A rotation by the square of the position, which tells more than distances."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = (position_ids**2)[..., None] * torch.tensor([1.0, 0.3, 0.1, 0.03]).repeat(2)
        return angles.cos(), angles.sin()


def squares() -> Any:
    model = build("llama")
    model.model.rotary_emb = Squares()
    return model


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (squares, "tells more than distances: two places at one distance"),
        pytest.param(lambda: test_torchtune.build("llama3_2"), "it cannot be had at 68 places", marks=pytest.mark.slow),
        pytest.param(lambda: build("gpt2"), "no RotaryEmbedding gives the queries", marks=pytest.mark.slow),
        pytest.param(lambda: build("gemma3"), r"other keys are hidden \(a window\?\)", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_stream_is_refused(model: Callable[[], Any], why: str) -> None:
    with pytest.raises(FxfuseError, match=why):
        export_decoder(model(), cache="streaming", window=64)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"cache": "streaming"}, "window"),
        ({"cache": "streaming", "window": 0}, "window"),
        ({"cache": "streaming", "window": 8, "sinks": -1}, "sinks"),
        ({"cache": "streaming", "window": 8, "one_token": True, "opset": 23}, "opset"),
        ({"cache": "streaming", "window": 8, "names": "hf"}, "names"),
        ({"cache": "static", "window": 8}, "window"),
        ({"cache": "sliding", "sinks": 0}, "sinks"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], where: str) -> None:
    with pytest.raises(FxfuseError) as caught:
        export_decoder(build("llama"), **options)
    assert caught.value.where == where
