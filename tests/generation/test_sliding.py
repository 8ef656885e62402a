"""Layers with a window in rings of its size, run by the session that owns them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxfuse.errors import FxfuseError
from fxfuse.onnx.decoder import export_decoder
from fxfuse.onnx.package import facts, write_package
from fxfuse.runtime import Session, generate
from tests.generation import tiny

NEW = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.trained("gemma3")
    out = tmp_path_factory.mktemp("gemma3") / "package"
    write_package(out, export_decoder(model, names="genai", cache="sliding"), model=facts(model.config))
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


def test_genai_has_no_words_for_it(tmp_path: Path) -> None:
    model = tiny.trained("gemma3")
    program = export_decoder(model, names="genai", cache="sliding")
    with pytest.raises(FxfuseError, match="shorter ones"):
        write_package(tmp_path / "out", program, package="genai", model=facts(model.config))
    assert not (tmp_path / "out").exists()
