"""A language model as one graph that prefills and decodes; `optimum-cli export fxfuse` is this with a command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, Gemma3TextConfig, LlamaConfig, MambaConfig

import fxfuse
import fxfuse.integrations.optimum as door
from fxfuse.decoder.export import export_decoder
from fxfuse.errors import FxfuseError, ParityError

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
LLAMA = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, eos_token_id=None)


def build(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    build(LLAMA).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def program() -> ir.Model:
    return export_decoder(build(LLAMA))


def test_inputs_outputs_and_axes(program: ir.Model) -> None:
    values = (*program.graph.inputs, *program.graph.outputs)
    assert {value.name: [str(dim) for dim in value.shape] for value in values} == {  # type: ignore[union-attr]
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        "past_key_values.0.key": ["batch_size", "2", "past_sequence_length", "8"],
        "past_key_values.0.value": ["batch_size", "2", "past_sequence_length", "8"],
        "logits": ["batch_size", "sequence_length", "64"],
        "present.0.key": ["batch_size", "2", "past_sequence_length + sequence_length", "8"],
        "present.0.value": ["batch_size", "2", "past_sequence_length + sequence_length", "8"],
    }
    dims = {str(dim) for node in program.graph.all_nodes() for value in node.outputs for dim in value.shape or ()}
    assert not {dim for dim in dims if dim.startswith("s") and dim[1:].isdecimal()}, "no symbol of torch is left"
    assert fxfuse.report(program).counts == {
        "RMSNormalization": 3,
        "RotaryEmbedding": 2,
        "Attention": 1,
        "KVCache": 1,
    }


def test_a_graph_that_computes_something_else_is_not_written(
    program: ir.Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "export_decoder", lambda model, **options: program)
    report = door.export_pretrained(str(folder), str(tmp_path / "right"))
    assert report.counts["Attention"] == 1
    assert {"model.onnx", "model.onnx.data", "config.json"} <= {path.name for path in (tmp_path / "right").iterdir()}

    embeddings = program.graph.initializers["model.embed_tokens.weight"]
    right = embeddings.const_value
    assert right is not None
    embeddings.const_value = ir.tensor(right.numpy()[::-1].copy(), name=embeddings.name)
    with pytest.raises(ParityError, match="does not give the model's logits"):
        door.export_pretrained(str(folder), str(tmp_path / "wrong"))
    embeddings.const_value = right
    assert not list((tmp_path / "wrong").iterdir())


def test_the_size_of_a_sliding_window_is_no_input(tmp_path: Path) -> None:
    """A window shorter than what is compared: the mask still cuts the keys off."""
    config = Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 2},
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=4,
        eos_token_id=None,
    )
    model = build(config)
    program = export_decoder(model)
    cache = [f"{layer}.{what}" for layer in (0, 1) for what in ("key", "value")]
    assert [v.name for v in program.graph.inputs][3:] == [f"past_key_values.{name}" for name in cache]
    assert [v.name for v in program.graph.outputs] == ["logits", *(f"present.{name}" for name in cache)]
    ir.save(program, tmp_path / "model.onnx")
    door.check_parity(model, tmp_path / "model.onnx")


def test_a_model_without_keys_and_values_is_refused() -> None:
    with pytest.raises(FxfuseError, match="Mamba"):
        export_decoder(build(MambaConfig(**SIZES, state_size=4)))


def test_a_model_that_gives_no_cache_back_is_refused() -> None:
    """BERT's language model without is_decoder attends to both sides, and reads all tokens in every call."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(FxfuseError, match=r"gives no cache back(.|\n)*BertLMHeadModel(.|\n)*is_decoder"):
        export_decoder(BertLMHeadModel(BertConfig(**sizes, intermediate_size=48)).eval())


@pytest.mark.parametrize("options", [{"names": "ort"}, {"opset": 22}])
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(FxfuseError, match=next(iter(options))):
        export_decoder(build(LLAMA), **options)


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(FxfuseError, match="the configuration cannot be read"):
        door.export_pretrained(str(tmp_path / "missing"), str(tmp_path / "out"))
    with pytest.raises(FxfuseError, match="float17"):
        door.export_pretrained(str(tmp_path), str(tmp_path / "out"), dtype="float17")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
