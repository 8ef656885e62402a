"""Reading real weights: safetensors or PyTorch files, whole or sharded, under torchtune's, Meta's or HF's names."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fxfuse.errors import FxfuseError

Weights = dict[str, torch.Tensor]

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
NOT_WEIGHTS = ("adapter_", "recipe_state", "optimizer", "training_args", "scheduler")
"""What training leaves beside the weights, by the beginnings of the names."""


def load_checkpoint(model: torch.nn.Module, path: Path, family: str | None = None) -> None:
    """Fill `model` with the weights in `path`, cast to the dtypes that `model` has.

    Args:
        model: every parameter and persistent buffer of it must be in the checkpoint, and nothing else.
        path: a folder or one file. Sharded checkpoints are read by their index, or all shards of a folder together.
        family: of a torchtune model, ``"qwen2"``: names in Meta's or HF's format are then converted.

    Raises:
        FxfuseError: missing, extra, misshapen or overflowing weights, each by name; no checkpoint; no such format.
    """
    weights = read(path)
    if family is not None:
        weights = to_torchtune(weights, model, family, path)
    own = model.state_dict()
    _complain("missing from the checkpoint", own.keys() - weights.keys(), path)
    _complain("in the checkpoint but not in the model", weights.keys() - own.keys(), path)
    for name, target in own.items():
        if weights[name].shape != target.shape:
            raise FxfuseError(
                f"{name} is {list(weights[name].shape)} in the checkpoint and {list(target.shape)} in the model",
                where=str(path),
                hint="are the builder and its options those of the checkpoint?",
            )
    with torch.no_grad():
        for name, target in own.items():
            target.copy_(weights[name])
            if target.dtype == torch.float16 and not bool(target.isfinite().all()):
                raise FxfuseError(f"{name} does not fit into float16", where=str(path), hint="--dtype float32")


def read(path: Path) -> Weights:
    """All tensors of the checkpoint `path`, mapped into memory rather than read."""
    weights: Weights = {}
    origin: dict[str, Path] = {}
    for file in _files(path):
        for name, tensor in _read_file(file).items():
            if name in weights:
                raise FxfuseError(
                    f"{name} is in {origin[name].name} and in {file.name}",
                    where=str(path),
                    hint="name the one file that holds the weights; tensor-parallel shards must be merged first",
                )
            weights[name], origin[name] = tensor, file
    return weights


def to_torchtune(weights: Weights, model: torch.nn.Module, family: str, path: Path) -> Weights:
    """`weights` under torchtune's names, by torchtune's own converters for the model's family."""
    own = model.state_dict().keys()
    if len(own & weights.keys()) * 2 > len(weights):
        return weights
    meta = any(".attention.wq." in name for name in weights)
    convert = _from_meta if meta else _from_hf(model, family)
    # A model that shares its embedding with its output may be saved with both; torchtune keeps one.
    for head, embedding in (
        ("lm_head.weight", "model.embed_tokens.weight"),
        ("output.weight", "tok_embeddings.weight"),
    ):
        if head in weights and "output.weight" not in own and _same(weights[head], weights.get(embedding)):
            weights = {name: tensor for name, tensor in weights.items() if name != head}
    try:
        converted = convert(weights)
    except Exception as error:  # torchtune raises a bare Exception on a name that it does not know
        raise FxfuseError(
            f"not a checkpoint of this model in torchtune's, Meta's or Hugging Face's names: {error}".strip(),
            where=str(path),
            hint=f"torchtune converts it as one of the family {family}",
        ) from error
    return dict(converted)


def _from_meta(weights: Weights) -> Mapping[str, torch.Tensor]:
    from torchtune.models.convert_weights import meta_to_tune

    converted: Mapping[str, torch.Tensor] = meta_to_tune(weights)
    return converted


def _from_hf(model: torch.nn.Module, family: str) -> Callable[[Weights], Mapping[str, torch.Tensor]]:
    """torchtune's converter for the family, with the sizes read off the model."""
    convert = {
        "phi3": "phi3._convert_weights.phi3_hf_to_tune",
        "phi4": "phi3._convert_weights.phi3_hf_to_tune",
        "qwen2": "qwen2._convert_weights.qwen2_hf_to_tune",
        "qwen2_5": "qwen2._convert_weights.qwen2_hf_to_tune",
        "gemma2": "gemma2._convert_weights.gemma2_hf_to_tune",
        "t5": "t5._convert_weights.t5_encoder_hf_to_tune",
        "clip": "clip._convert_weights.clip_text_hf_to_tune",
    }.get(family, "convert_weights.hf_to_tune")
    module, _, name = convert.rpartition(".")
    function = getattr(importlib.import_module(f"torchtune.models.{module}"), name)
    if family in ("t5", "clip"):
        return lambda weights: function(weights)

    layers: Any = model.layers
    attention = layers[0].attn
    sizes = {
        "num_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "dim": model.get_submodule("tok_embeddings").embedding_dim,
        "head_dim": attention.head_dim,
    }
    if name == "phi3_hf_to_tune":
        del sizes["head_dim"]
    return lambda weights: function(weights, **sizes)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FxfuseError("no such checkpoint", where=str(path))
    for index in INDEXES:
        if (path / index).is_file():
            return _shards(path / index)
    for suffix in SUFFIXES:
        files = sorted(f for f in path.glob(f"*{suffix}") if not f.name.startswith(NOT_WEIGHTS))
        if files:
            return files
    raise FxfuseError("no weights in the checkpoint folder", where=str(path), hint=f"looked for {', '.join(SUFFIXES)}")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise FxfuseError("not an index of shards: it has no weight_map", where=str(index)) from error
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise FxfuseError(f"shards are missing: {_some(absent)}", where=str(index))
    return [index.parent / name for name in names]


def _read_file(file: Path) -> Weights:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(file))
        loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except ImportError as error:
        raise FxfuseError("safetensors is not installed", hint="pip install 'fxfuse[torchtune]'") from error
    except Exception as error:  # safetensors, pickle and zipfile each raise their own
        raise FxfuseError(f"cannot be read as weights: {type(error).__name__}: {error}", where=str(file)) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):
        loaded = loaded["model"]  # torchtune's training recipes save the weights under this key
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise FxfuseError("holds something other than named tensors", where=str(file))
    return loaded


def _same(a: torch.Tensor, b: torch.Tensor | None) -> bool:
    return b is not None and torch.equal(a, b)


def _complain(what: str, names: Iterable[str], path: Path) -> None:
    names = sorted(names)
    if names:
        raise FxfuseError(
            f"{len(names)} weight{'s' if len(names) > 1 else ''} {what}: {_some(names)}",
            where=str(path),
            hint="are the builder and its options those of the checkpoint?",
        )


def _some(names: list[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
