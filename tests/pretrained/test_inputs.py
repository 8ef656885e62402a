"""Sample inputs of an encoder, by what its forward takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fxfuse.errors import FxfuseError
from fxfuse.pretrained import output_names, sample_of
from tests.pretrained.checkpoints import IMAGES, TEXT


def model(name: str, options: dict[str, Any]) -> Any:
    cls = getattr(transformers, name)
    return cls(cls.config_class(**options)).eval()


def test_tokens() -> None:
    """The first row ends in padding, and the padding's own id stands nowhere else."""
    given = sample_of(model("BertModel", TEXT), Path()).kwargs
    assert list(given) == ["input_ids", "attention_mask", "token_type_ids"]
    assert given["attention_mask"].tolist() == [[1] * 11 + [0] * 5, [1] * 16]
    assert torch.equal(given["input_ids"] == 0, given["attention_mask"] == 0)
    assert given["token_type_ids"].unique().tolist() == [0, 1]


@pytest.mark.parametrize("name", ["RobertaModel", "ModernBertModel", "CLIPTextModel"])
def test_without_kinds_of_tokens(name: str) -> None:
    one = {"type_vocab_size": 1} if name == "RobertaModel" else {}
    sample = sample_of(model(name, {**TEXT, "bos_token_id": 3, "eos_token_id": 1, **one}), Path(), batch=3, seq=5)
    assert {key: tuple(value.shape) for key, value in sample.kwargs.items()} == {
        "input_ids": (3, 5),
        "attention_mask": (3, 5),
    }
    assert sample.dynamic_shapes["input_ids"] == {0: "batch", 1: "sequence"}


def test_choices() -> None:
    sample = sample_of(model("BertForMultipleChoice", TEXT), Path())
    assert sample.kwargs["input_ids"].shape == (2, 3, 16)
    assert sample.dynamic_shapes["input_ids"] == {0: "batch", 1: "choices", 2: "sequence"}


def test_a_short_table_leaves_room() -> None:
    sample = sample_of(model("BertModel", {**TEXT, "max_position_embeddings": 8}), Path())
    assert sample.kwargs["input_ids"].shape == (2, 4)


def test_images(tmp_path: Path) -> None:
    sample = sample_of(model("ViTModel", IMAGES), tmp_path)
    assert sample.kwargs["pixel_values"].shape == (2, 3, 32, 32)
    assert sample.dynamic_shapes == {"pixel_values": {0: "batch"}}


@pytest.mark.parametrize(
    "settings, shape",
    [
        ({"size": {"height": 48, "width": 64}}, (48, 64)),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}, (32, 32)),
        ({"size": 32}, (32, 32)),
    ],
)
def test_images_whose_size_the_preprocessor_says(settings: Any, shape: tuple[int, int], tmp_path: Path) -> None:
    resnet = model("ResNetModel", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]})
    with pytest.raises(FxfuseError, match="how large the model's images are"):
        sample_of(resnet, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert sample_of(resnet, tmp_path).kwargs["pixel_values"].shape[-2:] == shape


def test_sizes_that_do_not_do() -> None:
    bert = model("BertModel", TEXT)
    with pytest.raises(FxfuseError, match="at least 2"):
        sample_of(bert, Path(), batch=1)
    with pytest.raises(FxfuseError, match="at most 64 tokens"):
        sample_of(bert, Path(), seq=65)
    with pytest.raises(FxfuseError, match="--seq does not apply"):
        sample_of(model("ViTModel", IMAGES), Path(), seq=8)


def test_names_of_the_outputs() -> None:
    bert = model("BertModel", {**TEXT, "output_hidden_states": True})
    program = torch.export.export(bert, (), sample_of(bert, Path()).kwargs)
    hidden = [f"hidden_states.{layer}" for layer in range(3)]
    assert output_names(program) == ["last_hidden_state", "pooler_output", *hidden]
    plain = torch.export.export(torch.nn.ReLU(), (torch.ones(2),))
    assert output_names(plain) == []
