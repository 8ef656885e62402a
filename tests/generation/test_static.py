"""A cache that is written in place: one buffer for the input and the output of every call, and no byte of it moves."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from fxfuse.decoder.export import export_decoder
from fxfuse.errors import FxfuseError
from fxfuse.runtime import Session, generate
from tests.generation import tiny


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("static") / "model.onnx"
    ir.save(export_decoder(tiny.trained("llama"), names="genai", cache="static"), path)
    return path


def test_the_buffers_stay_where_they_are(file: Path) -> None:
    session = Session(file, max_length=12, threads=1)
    session.prefill(torch.tensor([[7, 8, 9], [10, 11, 12]]))
    before = dict(session.pointers)
    assert len(set(before.values())) == len(before) == 4
    written = session._cache["past_key_values.1.key"].numpy()
    assert written[:, :, :3].any() and not written[:, :, 3:].any()
    for column in range(3, 12):
        kept = written[:, :, :column].copy()
        session.step(torch.tensor([20, 21]))
        assert session.pointers == before
        assert (written[:, :, :column] == kept).all(), "what was written stays"
        assert written[:, :, column].any(), "one column is new"
        assert not written[:, :, column + 1 :].any(), "and no other"
    session.reorder(torch.tensor([1, 0]))
    assert session.pointers == before, "beams change places within the buffer"


def test_beams(file: Path) -> None:
    session = Session(file, max_length=8, threads=1)
    ids = torch.tensor([[7, 8, 9], [20, 21, 22]])
    for rows in ([1, 0], [1, 0, 0]):
        session.reset()
        session.prefill(ids)
        session.reorder(torch.tensor(rows))
        tokens = torch.arange(30, 30 + len(rows))
        expected = tiny.trained("llama")(input_ids=torch.cat([ids[rows], tokens[:, None]], -1)).logits[:, -1]
        torch.testing.assert_close(session.step(tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_a_prompt_in_chunks_fills_the_buffer_to_its_end(file: Path, chunk: int | None) -> None:
    prompt = tiny.tokenizer().encode(tiny.PROMPTS[0]).ids
    session = Session(file, max_length=len(prompt) + 7, threads=1)
    assert generate(session, [prompt], max_new_tokens=8, chunk=chunk) == [tiny.continued("llama", prompt, 8)]
    assert session.length == session.max_length
    with pytest.raises(FxfuseError, match="do not fit into a cache of"):
        session.step(torch.tensor([1]))
    with pytest.raises(FxfuseError, match="do not fit into a cache of"):
        session.prefill(torch.tensor([[1]]))


def test_how_long_it_is_must_be_said(file: Path) -> None:
    with pytest.raises(FxfuseError, match="how many tokens the cache is to hold"):
        Session(file)
