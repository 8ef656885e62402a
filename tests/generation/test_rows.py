"""Graphs without an attention_mask: rows at lengths of their own, and streams without an end."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from fxfuse.decoder.export import export_decoder
from fxfuse.errors import FxfuseError
from fxfuse.runtime import Session, generate
from tests.generation import tiny

NEW = 24


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ragged") / "model.onnx"
    ir.save(export_decoder(tiny.trained("llama"), names="genai", cache="static", ragged=True), path)
    return path


def test_rows_of_unequal_length(ragged: Path) -> None:
    prompts = [tiny.tokenizer().encode(text).ids for text in tiny.PROMPTS]
    session = Session(ragged, max_length=64, threads=1)
    expected = [tiny.continued("llama", prompt, NEW) for prompt in prompts]
    assert generate(session, prompts, max_new_tokens=NEW) == expected
    session.reset()
    ids, mask = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64)
    for row, prompt in enumerate((prompts[0][:9], prompts[1][:4])):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = torch.tensor(prompt), 1
    chunks, whole = session.prefill(ids, mask, chunk=2), Session(ragged, max_length=64, threads=1).prefill(ids, mask)
    torch.testing.assert_close(chunks, whole, rtol=1e-4, atol=1e-4)


def test_padding_on_the_left_is_refused(ragged: Path) -> None:
    with pytest.raises(FxfuseError, match="pad on the right"):
        Session(ragged, max_length=8).prefill(torch.tensor([[0, 5], [6, 7]]), torch.tensor([[0, 1], [1, 1]]))


def test_a_stream_never_grows(tmp_path: Path) -> None:
    model, sinks, window = tiny.trained("llama"), 4, 28
    program = export_decoder(model, names="genai", cache="streaming", sinks=sinks, window=window)
    ir.save(program, tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx", threads=1)
    prompt = tiny.tokenizer().encode(tiny.PROMPTS[0]).ids
    fits = sinks + window - len(prompt)
    said = generate(session, [prompt], max_new_tokens=100)[0]
    assert fits > 4 and said[:fits] == tiny.continued("llama", prompt, fits), "while all of it is seen"
    assert {value.shape()[2] for value in session._cache.values()} == {sinks + window} and session.length > 100
    with pytest.raises(FxfuseError, match="one length"):
        Session(tmp_path / "model.onnx").prefill(torch.tensor([[6, 7], [5, 0]]), torch.tensor([[1, 1], [1, 0]]))
