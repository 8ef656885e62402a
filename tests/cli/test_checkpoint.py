"""Real weights, in every format that a checkpoint of a torchtune model comes in; made here, small."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchtune.models import convert_weights
from torchtune.models.gemma2._convert_weights import gemma2_tune_to_hf
from torchtune.models.phi3._convert_weights import phi3_tune_to_hf
from torchtune.models.qwen2._convert_weights import qwen2_tune_to_hf

from fxfuse.cli import main
from fxfuse.cli.checkpoint import load_checkpoint
from fxfuse.cli.torchtune import build
from fxfuse.errors import FxfuseError
from fxfuse.parity import onnxruntime_outputs

SIZES = {"vocab_size": 48, "num_layers": 12, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 16, "max_seq_len": 32}
GEMMA = {**SIZES, "intermediate_dim": 24, "head_dim": 8}
Weights = dict[str, torch.Tensor]


def trained(name: str, options: dict[str, Any]) -> tuple[nn.Module, str]:
    """A model whose weights no builder would make: what `load_checkpoint` must bring back."""
    model, family = build(name, options, torch.float32)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model, family


def weights_of(model: nn.Module) -> Weights:
    return {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, weights: Weights) -> bool:
    own = model.state_dict()
    return own.keys() == weights.keys() and all(torch.equal(own[name], weights[name]) for name in own)


def shards(weights: Weights) -> list[Weights]:
    names = list(weights)
    return [{name: weights[name] for name in names[i::3]} for i in range(3)]


def write_safetensors(folder: Path, weights: Weights) -> None:
    save_file(weights, folder / "model.safetensors")


def write_sharded_safetensors(folder: Path, weights: Weights) -> None:
    index = {}
    for i, shard in enumerate(shards(weights), 1):
        file = f"model-0000{i}-of-00003.safetensors"
        save_file(shard, folder / file)
        index |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_sharded_without_index(folder: Path, weights: Weights) -> None:
    for i, shard in enumerate(shards(weights), 1):
        save_file(shard, folder / f"ft-model-0000{i}-of-00003.safetensors")


def write_sharded_bin(folder: Path, weights: Weights) -> None:
    index = {}
    for i, shard in enumerate(shards(weights), 1):
        torch.save(shard, folder / f"pytorch_model-{i}.bin")
        index |= dict.fromkeys(shard, f"pytorch_model-{i}.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))


def write_pt(folder: Path, weights: Weights) -> None:
    torch.save(weights, folder / "torchtune_model_0.pt")


def write_recipe(folder: Path, weights: Weights) -> None:
    """As a recipe leaves it: the weights under "model", and files beside them that are none."""
    torch.save({"model": weights}, folder / "epoch_0.pt")
    torch.save({"optimizer": {}}, folder / "recipe_state.pt")
    torch.save({"lora": torch.ones(1)}, folder / "adapter_model.pt")


WRITERS = [
    write_safetensors,
    write_sharded_safetensors,
    write_sharded_without_index,
    write_sharded_bin,
    write_pt,
    write_recipe,
]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_files(write: Callable[[Path, Weights], None], tmp_path: Path) -> None:
    weights = weights_of(trained("llama3_2", SIZES)[0])
    write(tmp_path, weights)
    model, family = build("llama3_2", SIZES, torch.float32, blank=True)
    load_checkpoint(model, tmp_path, family)
    assert same(model, weights)


HEADS = {"num_heads": 4, "num_kv_heads": 2, "dim": 16}
FORMATS: dict[str, tuple[str, dict[str, Any], Callable[[Weights], Weights]]] = {
    "meta": ("llama3", SIZES, convert_weights.tune_to_meta),
    "hf llama": ("llama3_1", SIZES, lambda w: convert_weights.tune_to_hf(w, **HEADS)),
    "hf tied": ("llama3_2", SIZES, lambda w: convert_weights.tune_to_hf(w, **HEADS)),
    "hf mistral": (
        "mistral",
        {**SIZES, "intermediate_dim": 24},
        lambda w: convert_weights.tune_to_hf(w, **HEADS),
    ),
    "hf gemma": ("gemma", GEMMA, lambda w: convert_weights.tune_to_hf(w, **HEADS, head_dim=8)),
    "hf gemma2": ("gemma2", GEMMA, lambda w: gemma2_tune_to_hf(w, **HEADS, head_dim=8)),
    "hf phi3": ("phi3", {**SIZES, "intermediate_dim": 24}, phi3_tune_to_hf),
    "hf qwen2": ("qwen2", {**SIZES, "intermediate_dim": 24}, lambda w: qwen2_tune_to_hf(w, **HEADS)),
    "hf qwen2 tied": (
        "qwen2",
        {**SIZES, "intermediate_dim": 24, "tie_word_embeddings": True},
        lambda w: qwen2_tune_to_hf(w, **HEADS, tie_word_embeddings=True),
    ),
}


@pytest.mark.parametrize("case", FORMATS)
def test_formats(case: str, tmp_path: Path) -> None:
    name, options, convert = FORMATS[case]
    weights = weights_of(trained(name, options)[0])
    converted = {name: tensor.contiguous() for name, tensor in convert(dict(weights)).items()}
    assert converted.keys() != weights.keys(), "the test must convert"
    save_file(converted, tmp_path / "model.safetensors")
    model, family = build(name, options, torch.float32, blank=True)
    load_checkpoint(model, tmp_path, family)
    assert same(model, weights)


def test_a_tied_output_that_is_saved_twice_is_kept_once(tmp_path: Path) -> None:
    weights = weights_of(trained("llama3_2", SIZES)[0])
    hf = convert_weights.tune_to_hf(weights, **HEADS)
    model, family = build("llama3_2", SIZES, torch.float32, blank=True)
    write_pt(tmp_path, {**hf, "lm_head.weight": hf["model.embed_tokens.weight"].clone()})
    load_checkpoint(model, tmp_path, family)
    assert same(model, weights)
    write_pt(tmp_path, {**hf, "lm_head.weight": hf["model.embed_tokens.weight"] + 1})
    with pytest.raises(FxfuseError, match=r"not in the model: output.weight"):
        load_checkpoint(model, tmp_path, family)


def test_text_encoders(tmp_path: Path) -> None:
    options = {
        "embed_dim": 16,
        "mlp_dim": 24,
        "num_heads": 2,
        "head_dim": 8,
        "num_layers": 2,
        "rel_pos_num_buckets": 8,
        "rel_pos_max_dist": 16,
        "vocab_size": 48,
        "norm_eps": 1e-6,
        "max_seq_len": 12,
    }
    from torchtune.models.t5._convert_weights import _FROM_HF

    weights = weights_of(trained("t5_encoder", options)[0])
    names = {tune: hf.replace("layer._", "layer.") for hf, tune in _FROM_HF.items()}
    hf = {}
    for name, tensor in weights.items():
        layer = next((part for part in name.split(".") if part.isdigit()), "")
        hf[names[name.replace(f".{layer}.", ".{}.") if layer else name].format(layer or 0)] = tensor
    save_file({**hf, "decoder.x": torch.ones(1), "shared.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    model, family = build("t5_encoder", options, torch.float32, blank=True)
    load_checkpoint(model, tmp_path, family)
    assert same(model, weights)


def without(weights: Weights, name: str) -> Weights:
    return {key: tensor for key, tensor in weights.items() if key != name}


BAD: dict[str, tuple[Callable[[Path, Weights], Any], list[str]]] = {
    "missing": (
        lambda folder, w: write_pt(folder, without(w, "layers.3.attn.k_proj.weight")),
        ["1 weight missing from the checkpoint", "layers.3.attn.k_proj.weight"],
    ),
    "extra": (
        lambda folder, w: write_pt(folder, {**w, "layers.12.sa_norm.scale": torch.ones(16), "head": torch.ones(1)}),
        ["2 weights in the checkpoint but not in the model", "head, layers.12.sa_norm.scale"],
    ),
    "missing in HF": (
        lambda folder, w: write_pt(folder, without(convert_weights.tune_to_hf(w, **HEADS), "model.norm.weight")),
        ["missing from the checkpoint: norm.scale"],
    ),
    "unknown in HF": (
        lambda folder, w: write_pt(
            folder, {**convert_weights.tune_to_hf(w, **HEADS), "model.vision.weight": torch.ones(1)}
        ),
        ["model.vision.weight", "llama3_2"],
    ),
    "shape": (
        lambda folder, w: write_pt(folder, {**w, "norm.scale": torch.ones(8)}),
        ["norm.scale is [8] in the checkpoint and [16] in the model"],
    ),
    "empty folder": (lambda folder, w: None, ["no weights in the checkpoint folder"]),
    "not tensors": (
        lambda folder, w: torch.save({"model": {"a": 3}}, folder / "m.pt"),
        ["other than named tensors", "m.pt"],
    ),
    "not safetensors": (
        lambda folder, w: (folder / "m.safetensors").write_bytes(b"x" * 20),
        ["cannot be read as weights", "m.safetensors"],
    ),
    "not a pickle": (lambda folder, w: (folder / "m.bin").write_bytes(b"x" * 20), ["cannot be read", "m.bin"]),
    "twice": (
        lambda folder, w: [write_pt(folder, w), torch.save(w, folder / "torchtune_model_1.pt")],
        ["is in torchtune_model_0.pt and in torchtune_model_1.pt"],
    ),
    "shard gone": (
        lambda folder, w: [write_sharded_bin(folder, w), (folder / "pytorch_model-2.bin").unlink()],
        ["shards are missing: pytorch_model-2.bin"],
    ),
    "index of nothing": (
        lambda folder, w: (folder / "model.safetensors.index.json").write_text("[]"),
        ["not an index of shards"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_named(case: str, tmp_path: Path) -> None:
    write, words = BAD[case]
    write(tmp_path, weights_of(trained("llama3_2", SIZES)[0]))
    model, family = build("llama3_2", SIZES, torch.float32)
    before = weights_of(model)
    with pytest.raises(FxfuseError) as caught:
        load_checkpoint(model, tmp_path, family)
    assert str(tmp_path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert same(model, before)


def test_weights_that_overflow_float16_are_named(tmp_path: Path) -> None:
    weights = weights_of(trained("llama3_2", SIZES)[0])
    weights["norm.scale"][3] = 1e6
    write_safetensors(tmp_path, {name: tensor.bfloat16() for name, tensor in weights.items()})
    model, family = build("llama3_2", SIZES, torch.float16, blank=True)
    with pytest.raises(FxfuseError, match=r"norm.scale does not fit into float16"):
        load_checkpoint(model, tmp_path, family)


def test_the_exported_model_has_the_checkpoints_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = trained("llama3_2", {**SIZES, "num_layers": 1})
    (tmp_path / "weights").mkdir()
    write_sharded_safetensors(tmp_path / "weights", convert_weights.tune_to_hf(weights_of(model), **HEADS))
    options = [word for name, value in {**SIZES, "num_layers": 1}.items() for word in ("--set", f"{name}={value}")]
    arguments = ["export", "torchtune:llama3_2", *options, "--out", str(tmp_path / "o")]
    assert main([*arguments, "--checkpoint", str(tmp_path / "weights")]) == 0
    assert "random" not in capsys.readouterr().out
    tokens = torch.arange(9).reshape(1, 9)
    (logits,) = onnxruntime_outputs(tmp_path / "o" / "model.onnx", [tokens])
    torch.testing.assert_close(logits, model(tokens), rtol=1e-4, atol=1e-5)
