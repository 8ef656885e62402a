"""Streams without an end: a folder of two graphs from the command line, and the session that runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxfuse.cli import main
from fxfuse.errors import FxfuseError
from fxfuse.package.manifest import read_manifest
from fxfuse.package.write import write_package
from fxfuse.runtime import Session, generate
from tests.decoder.test_streaming import expected, llama_step, tokens
from tests.decoder.test_streaming import exported as exported_graph
from tests.generation import tiny

SINKS, WINDOW, NEW = 4, 28, 24
SIZE = SINKS + WINDOW
STREAMING = ["--cache", "streaming", "--sinks", str(SINKS), "--window", str(WINDOW)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "llama"
    assert main(["export", str(checkpoint), *STREAMING, "--pair", "--out", str(out)]) == 0
    return out


def text(length: int) -> list[int]:
    """Tokens of the text that the model has learnt."""
    return tiny.tokenizer().encode(tiny.TEXT.read_text()).ids[500 : 500 + length]


@torch.no_grad()
def reference(prompts: list[list[int]], new: int) -> list[list[int]]:
    """What transformers' modules say, token by token, keys rotated by their places in what is kept."""
    ids = torch.tensor(prompts)
    empty = torch.zeros(len(ids), 2, 0, 16)
    kept = [(empty, empty)] * 2
    said: list[torch.Tensor] = []
    for token in ids.split(1, 1):
        logits = llama_step(tiny.trained("llama"), token, kept, SINKS, WINDOW)
    while len(said) < new:
        said.append(logits.argmax(-1, keepdim=True))
        logits = llama_step(tiny.trained("llama"), said[-1], kept, SINKS, WINDOW)
    return torch.cat(said, 1).tolist()


def test_the_command_writes_a_pair(exported: Path) -> None:
    _, manifest = read_manifest(exported)
    assert (manifest.cache.form, manifest.cache.max_length, manifest.cache.layers[0].slots) == ("streaming", SIZE, SIZE)
    assert (manifest.prefill.tokens, manifest.decode.tokens) == (None, 1)
    assert manifest.files == ["prefill.onnx", "decode.onnx"] and all(link.shared for link in manifest.links)
    weights = sum(p.nbytes for p in tiny.trained("llama").parameters())
    assert (exported / "weights.data").stat().st_size < 1.2 * weights
    assert (exported / "decode.onnx").stat().st_size < 0.5 * weights


@pytest.mark.parametrize("length", [1, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE])
def test_the_references_tokens(length: int, exported: Path) -> None:
    """Two rows, the prompt whole and in chunks."""
    session = Session(exported, threads=1)
    prompts = [text(length), text(2 * length)[length:]]
    said = reference(prompts, NEW)
    for chunk in (None, 7):
        assert generate(session, prompts, max_new_tokens=NEW, chunk=chunk) == said


def test_nothing_grows(exported: Path) -> None:
    """The cache stays where it is, and of what was read nothing else is kept."""
    session = Session(exported, threads=1)
    session.prefill(torch.tensor([text(3 * SIZE)]))
    before, kept = dict(session.pointers), [value.shape() for value in session._cache.values()]
    for token in text(4 * SIZE):
        session.step(torch.tensor([token]))
    assert dict(session.pointers) == before
    assert [value.shape() for value in session._cache.values()] == kept == [[1, 2, SIZE, 16]] * 4
    assert session.length == 7 * SIZE and vars(session._positions).keys() == {"length", "_tokens"}


def test_beams(exported: Path) -> None:
    """Rows that change places in the middle of a stream."""
    prompts = [text(40), text(80)[40:]]
    session = Session(exported, threads=1)
    session.prefill(torch.tensor(prompts))
    session.reorder(torch.tensor([1, 0]))
    after = session.step(torch.tensor([20, 21]))
    session.reset()
    session.prefill(torch.tensor(prompts[::-1]))
    torch.testing.assert_close(session.step(torch.tensor([20, 21])), after)


def test_prompts_of_any_length(exported: Path) -> None:
    """As long as the model's context allows at once, which is 512 less what is kept; or as long as one asks for."""
    session = Session(exported, threads=1)
    assert [end - start for _, start, end in session._calls(1000, None)] == [481, 481, 38]
    assert [end - start for _, start, end in session._calls(1000, 600)] == [600, 400]
    ids = torch.tensor([text(1000)])
    whole = session.prefill(ids, chunk=1000)
    session.reset()
    torch.testing.assert_close(session.prefill(ids), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_no_call_needs_more_places_than_there_are(tmp_path: Path) -> None:
    """torchtune's cos and sin are a table, here of 64 places."""
    program, ids = exported_graph("llama3_2")[1], tokens(150)
    write_package(tmp_path / "out", program, model={"context_length": 64})
    session = Session(tmp_path / "out", threads=1)
    torch.testing.assert_close(session.prefill(ids), expected("llama3_2", ids)[:, -1], rtol=1e-4, atol=1e-4)
    session.reset()
    with pytest.raises(FxfuseError, match="fails to run"):
        session.prefill(ids, chunk=150)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits(dtype: str, checkpoint: Path, tmp_path: Path) -> None:
    """Compared with eager before it is written: bfloat16, which ONNX Runtime does not run here, as its float32 twin."""
    out = tmp_path / "out"
    assert main(["export", str(checkpoint), *STREAMING, "--pair", "--dtype", dtype, "--out", str(out)]) == 0
    if dtype == "float16":
        prompt = text(3 * SIZE)
        said = generate(Session(out, threads=1), [prompt], max_new_tokens=8)[0]
        assert said[0] == reference([prompt], 1)[0][0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cache", "streaming"], "a streaming cache needs a window, not None"),
        (["--cache", "streaming", "--window", "0"], "a streaming cache needs a window, not 0"),
        (["--cache", "streaming", "--window", "8", "--sinks", "-1"], "0 sinks or more, not -1"),
        (["--cache", "streaming", "--window", "8", "--pair", "--opset", "23"], "TensorScatter"),
        (["--cache", "streaming", "--window", "8", "--package", "genai"], "a streaming cache has shorter ones"),
        (["--cache", "sliding", "--package", "genai"], "a sliding cache has shorter ones"),
        (["--cache", "sliding", "--opset", "23"], "TensorScatter"),
        (["--cache", "sliding"], "no layer of the model has a sliding window"),
        (["--cache", "static", "--window", "8"], "only a streaming cache has a window to choose"),
        (["--window", "8"], "only a streaming cache has a window to choose"),
        (["--sinks", "0"], "only a streaming cache has sinks to choose"),
    ],
)
def test_what_does_not_go_together(
    words: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(checkpoint), *words, "--out", str(tmp_path / "out")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_stream_of_what_does_not_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "program.pt2", "--sinks", "0", "--out", str(tmp_path / "out")]) == 2
    assert "--sinks is for a model that generates text" in capsys.readouterr().err


def test_rows_of_one_length(exported: Path) -> None:
    with pytest.raises(FxfuseError, match="one length"):
        generate(Session(exported, threads=1), [[5, 6], [7]], max_new_tokens=1)
