"""Layers with a window in rings of its size, run by the session that owns them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxfuse.cli import main
from fxfuse.decoder.export import export_decoder
from fxfuse.errors import FxfuseError
from fxfuse.package.write import facts, write_package
from fxfuse.runtime import Session, generate
from tests.generation import tiny

NEW = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.trained("gemma3")
    out = tmp_path_factory.mktemp("gemma3") / "package"
    write_package(out, export_decoder(model, names="genai", cache="sliding"), model=facts(model.config))
    return out


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = tiny.save("gemma3", tmp_path_factory.mktemp("checkpoint"))
    out = tmp_path_factory.mktemp("pair") / "gemma3"
    assert main(["export", str(checkpoint), "--cache", "sliding", "--pair", "--out", str(out)]) == 0
    return out


def test_the_same_tokens_beyond_the_window(folder: Path) -> None:
    prompts = [tiny.tokenizer().encode(text).ids for text in tiny.PROMPTS]
    session = Session(folder, max_length=96, threads=1)
    assert [layer.slots for layer in session.manifest.cache.layers] == [tiny.WINDOW, None]
    assert generate(session, prompts, max_new_tokens=NEW) == [tiny.continued("gemma3", p, NEW) for p in prompts]
    assert session.length > tiny.WINDOW
    before = dict(session.pointers)
    generate(session, prompts[:1] * 3, max_new_tokens=2)
    assert before.keys() == session.pointers.keys()


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, tiny.WINDOW - 1, tiny.WINDOW, tiny.WINDOW + 1, 3 * tiny.WINDOW])
def test_a_pair_from_the_command_line(length: int, pair: Path) -> None:
    """What the model itself says of its whole text, of which each sliding layer sees W: the prompt in chunks too."""
    session = Session(pair, max_length=128, threads=1)
    assert (session.manifest.prefill.tokens, session.manifest.decode.tokens) == (None, 1)
    prompt = tiny.tokenizer().encode(tiny.TEXT.read_text()).ids[500 : 500 + length]
    expected = tiny.continued("gemma3", prompt, NEW)
    for chunk in (None, 7, 1):
        assert generate(session, [prompt], max_new_tokens=NEW, chunk=chunk) == [expected]


@pytest.mark.slow
def test_the_pairs_rings_stay_where_they_are(pair: Path) -> None:
    session = Session(pair, max_length=96, threads=1)
    session.prefill(torch.arange(2, 52)[None])
    before = dict(session.pointers)
    for token in range(2 * tiny.WINDOW - 10):
        session.step(torch.tensor([token]))
    assert dict(session.pointers) == before
    assert session._cache["past_key_values.0.key"].shape() == [1, 2, tiny.WINDOW, 16]


def test_genai_has_no_words_for_it(tmp_path: Path) -> None:
    model = tiny.trained("gemma3")
    program = export_decoder(model, names="genai", cache="sliding")
    with pytest.raises(FxfuseError, match="shorter ones"):
        write_package(tmp_path / "out", program, package="genai", model=facts(model.config))
    assert not (tmp_path / "out").exists()
