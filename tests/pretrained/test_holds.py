"""What a folder holds is told by config.json: a decoder, an encoder, or what is refused, by name and with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fxfuse.errors import FxfuseError
from fxfuse.pretrained import look
from tests.pretrained.checkpoints import DECODER, IMAGES, T5, TEXT, change_config, configured

VISION_AND_TEXT = {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": IMAGES}


@pytest.mark.parametrize(
    "name, options, kind",
    [
        ("LlamaForCausalLM", DECODER, "decoder"),
        ("Gemma3ForCausalLM", DECODER, "decoder"),  # its class says images, which its multimodal sister takes
        ("BartForCausalLM", {"vocab_size": 64, "d_model": 32}, "decoder"),
        ("LlamaForSequenceClassification", DECODER, "encoder"),
        ("LlamaModel", DECODER, "encoder"),
        ("BertForMaskedLM", TEXT, "encoder"),
        ("ViTForImageClassification", IMAGES, "encoder"),
        ("CLIPTextModel", TEXT, "encoder"),
        ("T5EncoderModel", T5, "encoder"),
    ],
)
def test_what_is_exported(name: str, options: dict[str, Any], kind: str, tmp_path: Path) -> None:
    held = look(str(configured(name, tmp_path, options)))
    assert (held.cls.__name__, held.kind) == (name, kind)


def test_an_encoder_alone_of_a_pair(tmp_path: Path) -> None:
    """Its config.json often says that of the pair: is_encoder_decoder."""
    assert look(str(configured("T5EncoderModel", tmp_path, T5, is_encoder_decoder=True))).kind == "encoder"


@pytest.mark.parametrize(
    "name, options",
    [
        ("BartForConditionalGeneration", {"d_model": 32}),
        ("BartForSequenceClassification", {"d_model": 32}),
        ("T5ForConditionalGeneration", T5),
        ("T5Model", T5),
        ("MarianMTModel", {"d_model": 32, "decoder_start_token_id": 0}),
        ("WhisperForConditionalGeneration", {"d_model": 32}),
        ("PegasusForConditionalGeneration", {"d_model": 32}),
    ],
)
def test_encoder_decoders_are_refused_by_name(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FxfuseError, match=f"{name} is an encoder–decoder"):
        look(str(configured(name, tmp_path, options)))


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("LlavaForConditionalGeneration", VISION_AND_TEXT, "vision_config"),
        ("Qwen2VLForConditionalGeneration", {}, "pixel_values"),
        ("Gemma3ForConditionalGeneration", {}, "vision_config"),
        ("Qwen2AudioForConditionalGeneration", {}, "audio_config"),
        ("CLIPModel", {}, "text_config"),
        ("LayoutLMv3Model", TEXT, "pixel_values"),
        ("GitForCausalLM", TEXT, "vision_config"),
    ],
)
def test_multimodal_models_are_refused_by_name(name: str, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(FxfuseError, match=f"{name} is multimodal .*{said}"):
        look(str(configured(name, tmp_path, options)))


def test_what_no_sample_is_known_for(tmp_path: Path) -> None:
    with pytest.raises(FxfuseError, match=r"Wav2Vec2Model takes input_values(.|\n)*factory"):
        look(str(configured("Wav2Vec2Model", tmp_path, {})))


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"architectures": None}, 'names no class.*\n.*\n.*"architectures": ..LlamaForCausalLM'),
        ({"architectures": []}, "names no class"),
        ({"architectures": ["LlamaModel", "LlamaForCausalLM"]}, "several classes: LlamaModel, LlamaForCausalLM"),
        ({"architectures": ["LlamaForPoetry"]}, "has no class LlamaForPoetry"),
        ({"architectures": ["Own"], "auto_map": {"AutoModel": "own.Own"}}, "code of its own, which is not run"),
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM, which takes a BertConfig.*of llama"),
        ({"model_type": None}, "cannot be read"),
    ],
)
def test_configurations_that_do_not_say_it(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = configured("LlamaForCausalLM", tmp_path, DECODER)
    with pytest.raises(FxfuseError, match=said):
        look(str(change_config(folder, **fields)))


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter(with_config: bool, tmp_path: Path) -> None:
    if with_config:
        configured("LlamaForCausalLM", tmp_path, DECODER)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "llama"}')
    with pytest.raises(FxfuseError, match=r"adapter(.|\n)*merge_and_unload"):
        look(str(tmp_path))


def test_no_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FxfuseError, match="the configuration cannot be read"):
        look(str(tmp_path))
