"""A session that owns the cache: what it says is what the model says, and nothing is copied on the way."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torchtune.models.llama3_2 import llama3_2

from fxfuse.decoder.export import export_decoder, export_step
from fxfuse.errors import FxfuseError
from fxfuse.integrations.torchtune import Eager
from fxfuse.package.write import write_package
from fxfuse.runtime import EagerSession, Session, generate, stream
from tests.generation import tiny

NEW = 64


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "model.onnx"
    ir.save(export_decoder(tiny.trained("llama"), names="genai"), path)
    return path


@pytest.fixture
def session(file: Path) -> Session:
    return Session(file, threads=1)


@pytest.fixture
def eager() -> EagerSession:
    return EagerSession(tiny.trained("llama"))


def prompts() -> list[list[int]]:
    return [tiny.tokenizer().encode(text).ids for text in tiny.PROMPTS]


def test_the_tiny_model_has_learnt_its_text() -> None:
    """Argmax stands clear of what comes second, or equal tokens would say little."""
    ids = torch.tensor([tiny.tokenizer().encode(tiny.TEXT.read_text()[2000:2600]).ids])
    logits = tiny.trained("llama")(input_ids=ids).logits[0, 16:-1]
    assert (logits.argmax(-1) == ids[0, 17:]).float().mean() > 0.7
    first, second = logits.topk(2).values.T
    assert (first - second).median() > 1


def test_rows_of_unequal_length_say_what_each_says_alone(session: Session, eager: EagerSession) -> None:
    expected = [tiny.continued("llama", prompt, NEW) for prompt in prompts()]
    assert len(set(map(tuple, expected))) == len(expected)
    assert generate(session, prompts(), max_new_tokens=NEW) == expected
    assert generate(eager, prompts(), max_new_tokens=NEW) == expected


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
def test_logits_at_either_side_and_in_chunks(
    session: Session, eager: EagerSession, side: str, chunk: int | None
) -> None:
    ids = torch.tensor([[7, 8, 9, 10, 11], [12, 13, 14, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    if side == "left":
        ids[1], mask[1] = ids[1].roll(2), mask[1].roll(2)
    whole = tiny.trained("llama")(input_ids=torch.tensor([[12, 13, 14]])).logits[0, -1]
    for each in (session, eager):
        logits = each.prefill(ids, mask, chunk=chunk)
        torch.testing.assert_close(logits[1], whole, rtol=1e-4, atol=1e-4)
    after = [each.step(torch.tensor([20, 21])) for each in (session, eager)]
    torch.testing.assert_close(after[0], after[1], rtol=1e-4, atol=1e-4)
    assert session.length == eager.length == 6


def test_a_growing_cache_is_handed_on_where_it_lies(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    session.prefill(torch.tensor([[7, 8, 9]]))
    bound: dict[str, int] = {}
    binding = type(session._sessions["model.onnx"].io_binding())
    original = binding.bind_ortvalue_input

    def record(self: Any, name: str, value: Any) -> None:
        bound[name] = value.data_ptr()
        original(self, name, value)

    monkeypatch.setattr(binding, "bind_ortvalue_input", record)
    for token in (10, 11, 12):
        given = dict(session.pointers)  # what the last call wrote
        session.step(torch.tensor([token]))
        assert {name: bound[name] for name in given} == given, "it reads just there"


def test_beams(session: Session, eager: EagerSession) -> None:
    """Row 0 twice, and rows that change places: as if it had been so from the beginning."""
    ids = torch.tensor([[7, 8, 9], [20, 21, 22]])
    for each in (session, eager):
        each.prefill(ids)
    rows = torch.tensor([1, 0, 0])
    for each in (session, eager):
        each.reorder(rows)
    tokens = torch.tensor([30, 31, 32])
    expected = tiny.trained("llama")(input_ids=torch.cat([ids[rows], tokens[:, None]], -1)).logits[:, -1]
    for each in (session, eager):
        torch.testing.assert_close(each.step(tokens), expected, rtol=1e-4, atol=1e-4)


def test_beams_of_torchtune() -> None:
    sizes = {"vocab_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "max_seq_len": 16}
    model = llama3_2(**sizes, intermediate_dim=48).eval()
    eager = EagerSession(Eager(model))
    ids, rows, tokens = torch.tensor([[7, 8, 9], [20, 21, 22]]), torch.tensor([1, 0, 0]), torch.tensor([30, 31, 32])
    eager.prefill(ids)
    eager.reorder(rows)
    expected = model(torch.cat([ids[rows], tokens[:, None]], -1))[:, -1]
    torch.testing.assert_close(eager.step(tokens), expected, rtol=1e-4, atol=1e-4)


def test_reset_forgets(session: Session) -> None:
    ids = torch.tensor([[7, 8, 9]])
    first = session.prefill(ids)
    assert not torch.equal(session.prefill(ids), first), "it goes on"
    session.reset()
    assert session.length == 0
    assert torch.equal(session.prefill(ids), first)


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph that takes four tokens, as one for fixed shapes does, and one that takes one."""
    prefill = export_decoder(tiny.trained("llama"), names="genai")
    for value in prefill.graph.inputs:
        if value.name in ("input_ids", "position_ids"):
            value.shape = ir.Shape(["batch_size", 4])
    out = tmp_path_factory.mktemp("fixed") / "package"
    write_package(out, prefill, decode=export_step(tiny.trained("llama")))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 3, 4, 5, 12, 15])
def test_a_prompt_longer_than_what_a_graph_takes(length: int, fixed: Path, eager: EagerSession) -> None:
    ids = torch.arange(5, 5 + 2 * length).reshape(2, length)
    mask = torch.ones_like(ids)
    mask[0, : length // 2] = 0
    for graphs in (fixed, fixed / "decode.onnx"):
        eager.reset()
        session = Session(graphs, threads=1)
        torch.testing.assert_close(session.prefill(ids, mask), eager.prefill(ids, mask), rtol=1e-4, atol=1e-4)
        more = torch.tensor([7, 8])
        torch.testing.assert_close(session.step(more), eager.step(more), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_tokens_that_no_graph_takes(fixed: Path) -> None:
    session = Session(fixed / "prefill.onnx", threads=1)
    with pytest.raises(FxfuseError, match="of 6 tokens 2 are left over: a call takes 4"):
        session.prefill(torch.arange(6)[None])
    assert session.length == 0


def test_text_as_it_comes(session: Session, eager: EagerSession) -> None:
    text, tokenizer = tiny.PROMPTS[0], tiny.tokenizer()
    pieces = list(stream(session, tokenizer, text, max_new_tokens=NEW))
    assert len(pieces) > NEW / 2
    assert "".join(pieces) == tokenizer.decode(tiny.continued("llama", tokenizer.encode(text).ids, NEW))
    assert pieces == list(stream(eager, tokenizer, text, max_new_tokens=NEW))


class Bytes:
    """Every token a byte: a character may be three tokens."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


class Says:
    """Says the given tokens."""

    reads_mask = True

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.length = iter(tokens), 0

    def reset(self) -> None: ...

    def prefill(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([next(self.tokens)]), 256)

    step = prefill


@pytest.mark.parametrize("text", ["a € b", "ü", "1€€2", "語"])
def test_no_half_characters(text: str) -> None:
    tokens = list(text.encode())
    assert list(stream(Says(tokens), Bytes(), "?", max_new_tokens=len(tokens))) == list(text)  # type: ignore[arg-type]


def test_the_end_of_the_text(eager: EagerSession) -> None:
    said = generate(eager, prompts()[:1], max_new_tokens=8)[0]
    end = said[3]
    assert generate(eager, prompts()[:1], max_new_tokens=8, eos=[end])[0] == said[: said.index(end) + 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.step(torch.tensor([1])), "nothing to go on from"),
        (lambda s: s.prefill(torch.tensor([1])), r"\[B, S\]"),
        (lambda s: s.prefill(torch.tensor([[1, 2]]), torch.tensor([[1]])), "mask is"),
        (lambda s: s.prefill(torch.tensor([[1, 2]]), torch.tensor([[0, 0]])), "without a token"),
        (lambda s: generate(s, [[1], []], max_new_tokens=2), "at least one token"),
        (lambda s: (s.prefill(torch.tensor([[1, 2]])), s.step(torch.tensor([1, 2]))), "2 rows after 1"),
        (lambda s: s.prefill(torch.tensor([[1, 2]]), chunk=0), "chunk"),
        (lambda s: s.reorder(torch.tensor([0])), "not rows of 0"),
        (lambda s: (s.prefill(torch.tensor([[1, 2]])), s.reorder(torch.tensor([1]))), "not rows of 1"),
    ],
)
def test_bad_input(session: Session, eager: EagerSession, call: Any, message: str) -> None:
    for each in (session, eager):
        with pytest.raises(FxfuseError, match=message):
            call(each)


def test_what_the_session_refuses(session: Session, file: Path, tmp_path: Path) -> None:
    session.prefill(torch.tensor([[1, 2]]))
    for rows in ([2], [-1], [[0]], []):
        with pytest.raises(FxfuseError, match="not rows of 1"):
            session.reorder(torch.tensor(rows, dtype=torch.int64))
    with pytest.raises(FxfuseError, match="chunk"):
        session.prefill(torch.tensor([[1, 2]]), chunk=0)
    with pytest.raises(FxfuseError, match="it has no max_length"):
        Session(file, max_length=5)
    with pytest.raises(FxfuseError, match=r"no fxfuse\.json"):
        Session(tmp_path)
    (tmp_path / "broken.onnx").write_bytes(b"not ONNX")
    with pytest.raises(FxfuseError, match=r"cannot be read|decoder"):
        Session(tmp_path / "broken.onnx")
    assert list(itertools.islice(session.pointers, 2)) == ["past_key_values.0.key", "past_key_values.0.value"]
