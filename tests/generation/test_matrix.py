"""Model × cache × graphs × batch × runtime: the same tokens everywhere, 64 of them and more.

What they are compared with is the model itself, reading its whole text again for every token.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from fxfuse.decoder.export import export_decoder, export_step
from fxfuse.integrations.torchtune import Eager
from fxfuse.package.write import write_package
from fxfuse.runtime import EagerSession, Session, generate
from tests.generation import tiny

NEW = 64
FORMS = ["growing", "static"]
SAMPLE = {("llama", "static", "pair")}
"""In the default run."""

BATCHES = {
    "one": tiny.PROMPTS[:1],
    "two": (tiny.PROMPTS[0], "You must retain, in the Source form of any Derivative Works"),
    "ragged": tiny.PROMPTS,
}


def cells() -> list[Any]:
    return [
        pytest.param(name, form, graphs, marks=() if (name, form, graphs) in SAMPLE else pytest.mark.slow)
        for name in (*tiny.CONFIGS, *tiny.BUILDERS)
        for form in FORMS
        for graphs in ("one", "pair")
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packages")


@functools.cache
def package(root: Path, name: str, form: str, graphs: str) -> Path:
    model, folder = tiny.trained(name), root / f"{name}-{form}-{graphs}"
    checkpoint = tiny.save(name, root / f"{name}-checkpoint")
    prefill = export_decoder(model, names="genai", cache=form)
    decode = export_step(model, cache=form) if graphs == "pair" else None
    write_package(folder, prefill, decode=decode, package="genai", model=tiny.facts(name), tokenizer=checkpoint)
    return folder


@functools.cache
def expected(name: str, batch: str) -> list[list[int]]:
    return [tiny.continued(name, prompt, NEW) for prompt in prompts(batch)]


def prompts(batch: str) -> list[list[int]]:
    """Those of "two" are of one length, the others as they come."""
    ids = [tiny.tokenizer().encode(text).ids for text in BATCHES[batch]]
    return [prompt[: min(map(len, ids))] for prompt in ids] if batch == "two" else ids


@pytest.mark.parametrize(("name", "form", "graphs"), cells())
@pytest.mark.parametrize("batch", BATCHES)
class TestTheSameTokens:
    def test_eager(self, batch: str, name: str, form: str, graphs: str) -> None:
        model = tiny.trained(name)
        eager = EagerSession(Eager(model) if name in tiny.BUILDERS else model)
        assert generate(eager, prompts(batch), max_new_tokens=NEW) == expected(name, batch)

    def test_fxfuse_runtime(self, batch: str, name: str, form: str, graphs: str, root: Path) -> None:
        room = 160 if form == "static" else None
        session = Session(package(root, name, form, graphs), max_length=room, threads=1)
        assert generate(session, prompts(batch), max_new_tokens=NEW) == expected(name, batch)

    def test_genai(self, batch: str, name: str, form: str, graphs: str, root: Path) -> None:
        genai = pytest.importorskip("tests.generation.genai").GenAI(package(root, name, form, graphs))
        texts = BATCHES[batch]
        assert [genai.tokenizer.encode(text).tolist() for text in texts] == [
            tiny.tokenizer().encode(text).ids for text in texts
        ]
        assert genai.generate(prompts(batch), NEW) == expected(name, batch)


def test_the_tokens_mean_something() -> None:
    for batch in BATCHES:
        rows = expected("llama", batch)
        assert len({tuple(row) for row in rows}) == len(rows)
        assert all(len(set(row)) > 16 for row in rows), "no row repeats itself"
