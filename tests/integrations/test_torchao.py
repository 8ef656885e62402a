"""Weights rounded by torchao before a model is exported: the scheme, ties, and the tokens that packages generate."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn

from fxfuse.cli import main
from fxfuse.decoder.export import export_decoder
from fxfuse.errors import FxfuseError
from fxfuse.package.write import write_package
from fxfuse.runtime import Session, generate
from tests.generation import tiny

pytest.importorskip("torchao.quantization")
from fxfuse.integrations.torchao import Scheme, parse_scheme, quantize


def test_schemes() -> None:
    assert parse_scheme("int4") == Scheme(4, 32, False)
    assert parse_scheme("int4:block=64:symmetric") == Scheme(4, 64, True)
    assert parse_scheme("int8") == Scheme(8, None, False)
    assert parse_scheme("none") is None


@pytest.mark.parametrize("text", ["int9", "fp4", "int4:block=0", "int4:block=x", "int4:codebook", ""])
def test_schemes_that_there_are_none_of(text: str) -> None:
    with pytest.raises(FxfuseError, match=r"is no option|no scheme") as raised:
        parse_scheme(text)
    assert "int4:block=32:symmetric" in str(raised.value)


def test_a_block_that_rows_are_no_multiple_of_is_told_before_anything_is_changed() -> None:
    model = nn.Sequential(nn.Linear(34, 34), nn.Linear(34, 8))
    with pytest.raises(FxfuseError, match=r"no whole number of blocks of 32\s.*0\.weight"):
        quantize(model, "int4")
    assert all(type(p.data) is torch.Tensor for p in model.parameters())


def test_nothing_twice() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    quantize(model, "int4")
    with pytest.raises(FxfuseError, match="quantised already"):
        quantize(model, "int8")
    with pytest.raises(FxfuseError, match="no weight to quantise"):
        quantize(nn.Sequential(nn.SiLU()), "int4")


def llama(**options: Any) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    return AutoModelForCausalLM.from_config(LlamaConfig(**{**tiny.GROUPED, **options})).eval()


def test_embedding_and_output_are_chosen_by_themselves() -> None:
    chosen = quantize(llama(), "int4:symmetric", embedding="int8", head="none")
    assert chosen["model.embed_tokens.weight"] == Scheme(8, None, False)
    assert chosen["lm_head.weight"] is None
    assert chosen["model.layers.0.mlp.up_proj.weight"] == Scheme(4, 32, True)


def test_tied_weights_stay_tied() -> None:
    model = llama(tie_word_embeddings=True)
    chosen = quantize(model, "int4")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert chosen["model.embed_tokens.weight"] == Scheme(4, 32, False)
    with pytest.raises(FxfuseError, match="are one weight"):
        quantize(llama(tie_word_embeddings=True), "int4", embedding="int8", head="int4")


@torch.no_grad()
def continued(model: Any, prompt: list[int], new: int) -> list[int]:
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(("cache", "scheme"), [("growing", "int4"), ("static", "int4:symmetric")])
def test_tokens_are_those_of_the_quantised_model(tmp_path: Path, cache: Any, scheme: str) -> None:
    """64 steps on a model that has learnt its text, in fxfuse.runtime and in onnxruntime-genai."""
    pytest.importorskip("onnxruntime_genai")
    from tests.generation.genai import GenAI

    model = copy.deepcopy(tiny.trained("llama"))
    quantize(model, scheme, embedding="int8")
    tokenizer = tiny.save("llama", tmp_path / "tokenizer")
    out = tmp_path / "out"
    graph = export_decoder(model, names="genai", cache=cache)
    write_package(out, graph, package="genai", model=tiny.facts("llama"), tokenizer=tokenizer)
    prompt = tiny.tokenizer().encode(tiny.PROMPTS[0]).ids
    expected = continued(model, prompt, 64)
    session = Session(out, max_length=len(prompt) + 64 if cache == "static" else None, threads=1)
    assert generate(session, [prompt], max_new_tokens=64) == [expected]
    assert GenAI(out).generate([prompt], 64) == [expected]


def test_the_command(tmp_path: Path) -> None:
    """One INT4 copy of a weight that is embedding and output, and logits of the quantised model."""
    folder = tmp_path / "model"
    llama(tie_word_embeddings=True).save_pretrained(folder)
    out = tmp_path / "out"
    assert main(["export", str(folder), "--out", str(out), "--quantize", "int4:symmetric"]) == 0
    program = ir.load(out / "model.onnx")
    large = [v for v in program.graph.initializers.values() if v.const_value.size >= 384 * 64]
    assert [v.dtype.name for v in large] == ["INT4"]
    assert len([n for n in program.graph if n.op_type == "MatMul"]) == 15
    assert not [n for n in program.graph if n.op_type == "MatMul" and n.inputs[1].producer().op_type == "Transpose"]
    assert json.loads((out / "report.json").read_text())["parity"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.pt2", "--quantize", "int4"], "saved program"),
        (["torchtune:llama3_2_1b", "--quantize", "int1"], "no scheme"),
        (["torchtune:llama3_2_1b", "--quantize-head", "int4"], "goes with --quantize"),
    ],
)
def test_what_the_command_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["export", *options, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
