"""A static cache: new keys are scattered into buffers of any length, and attention reads the part that is filled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DiffLlamaConfig

from fxfuse.decoder.export import export_decoder
from fxfuse.errors import FxfuseError
from tests.decoder.models import CONFIGS, PADDED, PROMPT, Decoder, build, expected, operators

SAMPLE = ("llama", "gemma3")
NAMES = [n if n in SAMPLE else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS]


@pytest.mark.parametrize("name", NAMES)
def test_decoders_prefill_and_decode(name: str, tmp_path: Path) -> None:
    """In buffers that are just long enough, and longer: what lies beyond the tokens is large, and never seen."""
    model = build(name)
    program = export_decoder(model, cache="static")
    counted = operators(program)
    assert counted.count("TensorScatter") == 4 and counted.count("Attention") == 2
    tokens, logits = expected(model, PROMPT, PADDED, 6)
    for length, chunk in ((PROMPT.shape[1] + 5, None), (40, 2)):
        ours, values = Decoder(program, tmp_path, length).greedy(PROMPT, PADDED, 6, chunk)
        torch.testing.assert_close(values, logits, atol=2e-5, rtol=1e-4)
        assert torch.equal(ours, tokens)


def test_a_cache_that_no_attention_joins(tmp_path: Path) -> None:
    """Written out, as the model has it: the concatenation of past and new keys goes, whatever reads it."""
    torch.manual_seed(0)
    config = DiffLlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    program = export_decoder(model, cache="static")
    caches = {value for value in program.graph.inputs if (value.name or "").startswith("past_key_values")}
    assert not [n for n in program.graph if n.op_type == "Concat" and caches & set(n.inputs)]
    tokens, logits = expected(model, PROMPT, PADDED, 4)
    ours, values = Decoder(program, tmp_path, 12).greedy(PROMPT, PADDED, 4)
    torch.testing.assert_close(values, logits, atol=2e-5, rtol=1e-4)
    assert torch.equal(ours, tokens)


def test_padding_on_the_right(tmp_path: Path) -> None:
    """As ONNX Runtime GenAI pads: the row's tokens go on after its padding, which stays hidden."""
    model = build("llama")
    decoder = Decoder(export_decoder(model, cache="static"), tmp_path, 12)
    ids, mask = torch.tensor([[5, 9, 21, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    decoder.start(1)
    first = decoder(ids, mask)[:, 2]
    more = decoder(torch.tensor([[33]]), torch.cat([mask, torch.ones_like(mask[:, :1])], 1))[:, -1]
    with torch.no_grad():
        logits = model(torch.tensor([[5, 9, 21, 33]])).logits
    torch.testing.assert_close(first, logits[:, 2], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(more, logits[:, 3], atol=2e-5, rtol=1e-4)


def test_the_whole_buffer_is_read_where_that_is_faster(tmp_path: Path) -> None:
    model = build("llama")
    program = export_decoder(model, cache="static", profile="cuda")
    attention = next(node for node in program.graph if node.op_type == "Attention")
    assert attention.inputs[1].producer().op_type == "TensorScatter" and attention.inputs[6] is not None
    tokens, logits = expected(model, PROMPT, PADDED, 4)
    ours, values = Decoder(program, tmp_path, 16).greedy(PROMPT, PADDED, 4)
    torch.testing.assert_close(values, logits, atol=2e-5, rtol=1e-4)
    assert torch.equal(ours, tokens)


def test_the_model_says_what_its_cache_is() -> None:
    program = export_decoder(build("llama"), cache="static")
    said = json.loads(program.metadata_props["fxfuse.state"])
    assert said["form"] == "static" and said["layers"] == [{"heads": 2, "head_dim": 8}] * 2
    shapes = {value.name: str(value.shape) for value in (*program.graph.inputs, *program.graph.outputs)}
    assert len(said["aliases"]) == 4
    assert all(
        shapes[present] == shapes[past] == "[batch_size,2,max_length,8]" for present, past in said["aliases"].items()
    )
    growing = json.loads(export_decoder(build("llama")).metadata_props["fxfuse.state"])
    assert growing["form"] == "growing" and not growing["aliases"]


@pytest.mark.parametrize(
    "options, where",
    [
        ({"opset": 23}, "opset"),
        ({"names": "hf"}, "names"),
        ({"cache": "ring"}, "cache"),
        ({"profile": "tpu"}, "profile"),
        ({"cache": "growing", "profile": "cuda"}, "profile"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], where: str) -> None:
    with pytest.raises(FxfuseError) as caught:
        export_decoder(build("llama"), **{"cache": "static", **options})
    assert caught.value.where == where
