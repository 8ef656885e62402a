"""Sample inputs for an encoder of transformers (tokens with padding, or images), and which of their dimensions vary."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from fxfuse.errors import FxfuseError
from fxfuse.torch_seams import pytree

BATCH, SEQ, CHOICES = 2, 16, 3
"""Batch and length of the samples if none are given."""

PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class Sample:
    """A sample call of the model, and which dimensions vary."""

    kwargs: dict[str, torch.Tensor]
    dynamic_shapes: dict[str, dict[int, str]]


def sample_of(model: Any, folder: Path, batch: int | None = None, seq: int | None = None) -> Sample:
    """Inputs by name for an encoder: input_ids, attention_mask and token_type_ids [B, S], or pixel_values [B, C, H, W].

    If the model takes a mask, the first row of tokens is padded on the right. Batch and length vary; the height and
    width of images are those that the model was made for.

    Args:
        model: a `PreTrainedModel`.
        folder: the folder of its checkpoint, whose preprocessor_config.json may say how large images are.
        batch: at least 2.
        seq: the number of tokens.

    Raises:
        FxfuseError: more tokens than the model takes, a dimension that cannot vary from its sample, or images whose
            size is not known.
    """
    batch = BATCH if batch is None else batch
    if batch < 2:
        raise FxfuseError("a dimension that varies needs a sample of at least 2", where=f"--batch {batch}")
    if model.main_input_name == "pixel_values":
        if seq is not None:
            raise FxfuseError("--seq does not apply to a model that takes images", where=f"--seq {seq}")
        return _images(model, folder, batch)
    return _tokens(model, batch, seq)


def _tokens(model: Any, batch: int, seq: int | None) -> Sample:
    config = model.config.get_text_config()
    limit = next((n for name in ("max_position_embeddings", "n_positions") if (n := getattr(config, name, None))), None)
    if seq is None:
        # At most half of a short table of positions, so that the comparison at another length stays within the table.
        seq = SEQ if not isinstance(limit, int) or limit < 0 else max(2, min(SEQ, limit // 2))
    elif seq < 2 or (isinstance(limit, int) and 0 < limit < seq):
        raise FxfuseError(f"the model takes at most {limit} tokens, and a sample needs 2", where=f"--seq {seq}")
    taken = inspect.signature(model.forward).parameters
    choices = (CHOICES,) if _chooses(model) else ()
    shape = (batch, *choices, seq)
    pad = getattr(config, "pad_token_id", None)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, config.vocab_size, shape, generator=draw)
    if isinstance(pad, int) and pad >= 0:
        # The id of padding stands only where padding is, because some models find the padding by it.
        ids[ids == pad] = (pad + 1) % config.vocab_size
    kwargs = {"input_ids": ids}
    if "attention_mask" in taken:
        mask = torch.ones(shape, dtype=torch.int64)
        mask[0, ..., seq - seq // 3 :] = 0
        if isinstance(pad, int) and 0 <= pad < config.vocab_size:
            ids[mask == 0] = pad
        kwargs["attention_mask"] = mask
    if "token_type_ids" in taken and (getattr(config, "type_vocab_size", None) or 0) > 1:
        kinds = torch.zeros(shape, dtype=torch.int64)
        kinds[..., seq // 2 :] = 1
        kwargs["token_type_ids"] = kinds
    # A head for multiple choice reads all choices of a row at once, however many there are.
    axes = {0: "batch", len(shape) - 1: "sequence"} | ({1: "choices"} if choices else {})
    return Sample(kwargs, {name: dict(axes) for name in kwargs})


def _chooses(model: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

    return type(model).__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values()


def _images(model: Any, folder: Path, batch: int) -> Sample:
    config = model.config
    size = _height_width(getattr(config, "image_size", None)) or _height_width(_preprocessed(folder))
    if size is None:
        raise FxfuseError(
            "how large the model's images are is not known",
            where=str(folder),
            hint=f"image_size in config.json, or size in {PREPROCESSOR}",
        )
    channels = getattr(config, "num_channels", None) or 3
    pixels = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    return Sample({"pixel_values": pixels.to(model.dtype)}, {"pixel_values": {0: "batch"}})


def _preprocessed(folder: Path) -> Any:
    file = folder / PREPROCESSOR
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        cropped = settings.get("crop_size") if settings.get("do_center_crop", True) else None
        return cropped or settings.get("size")
    except (ValueError, AttributeError) as error:
        raise FxfuseError(f"not a preprocessor's settings: {error}", where=str(file)) from error


def _height_width(size: Any) -> tuple[int, int] | None:
    """An image's height and width, however they are written down; None if they are not."""
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
        size = (size.get("height", edge), size.get("width", edge))
    elif isinstance(size, int):
        size = (size, size)
    if not isinstance(size, (tuple, list)) or len(size) != 2 or not all(isinstance(n, int) for n in size):
        return None
    return int(size[0]), int(size[1])


def output_names(program: ExportedProgram) -> list[str]:
    """What the model calls its outputs, ``"logits"`` or ``"hidden_states.0"``, in their order in the graph.

    An empty list if the program returns neither a `ModelOutput` nor a dict.
    """
    spec = program.call_spec.out_spec
    if spec is None:
        return []
    returned = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    if not isinstance(returned, Mapping):
        return []
    names = []
    for name, value in returned.items():
        leaves = pytree.tree_leaves(value)
        names += [name] if leaves == [value] else [f"{name}.{i}" for i in range(len(leaves))]
    return names
