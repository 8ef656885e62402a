"""Windows that count tokens: a row that is padded on the right goes on as it would alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torchtune.models.gemma2 import gemma2
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from fxfuse.decoder.export import Cache, export_decoder
from fxfuse.decoder.masks.token_windows import with_token_windows
from fxfuse.package.write import write_package
from fxfuse.runtime import Session

WINDOW = 4
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "eos_token_id": None,
}
TUNE: dict[str, Any] = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "head_dim": 8}
IDS = torch.tensor([[5, 9, 21, 0, 0, 0], [7, 3, 44, 12, 60, 2]])
MASK = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
NEXT = torch.tensor([[30, 31, 32, 33], [40, 41, 42, 43]])


def build(name: str) -> Any:
    torch.manual_seed(0)
    if name == "gemma2":
        sizes = {**TUNE, "vocab_size": 64, "max_seq_len": 64, "intermediate_dim": 48, "sliding_window_size": WINDOW}
        return gemma2(**sizes).eval()
    config = LlamaConfig(**SIZES) if name == "llama" else MistralConfig(**SIZES, sliding_window=WINDOW)
    return AutoModelForCausalLM.from_config(config).eval()


def alone(model: Any, row: int) -> torch.Tensor:
    """The logits [5, V] of the row's tokens without padding: after its prompt, and after each of the next."""
    ids = torch.cat([IDS[row, : int(MASK[row].sum())], NEXT[row]])[None]
    with torch.no_grad():
        logits = model(ids) if hasattr(model, "tok_embeddings") else model(input_ids=ids).logits
    return logits[0, -NEXT.shape[1] - 1 :]


def goes_on(session: Session) -> torch.Tensor:
    """The same [2, 5, V] of a batch that is padded on the right."""
    logits = [session.prefill(IDS, MASK), *(session.step(tokens) for tokens in NEXT.T)]
    return torch.stack(logits, 1)


@pytest.mark.parametrize(
    ("name", "cache", "pair"),
    [
        ("mistral", "growing", True),
        ("gemma2", "static", False),
        pytest.param("mistral", "static", False, marks=pytest.mark.slow),
        pytest.param("gemma2", "growing", True, marks=pytest.mark.slow),
    ],
)
def test_a_row_goes_on_after_its_padding(name: str, cache: Cache, pair: bool, tmp_path: Path) -> None:
    model = build(name)
    expected = torch.stack([alone(model, row) for row in range(len(IDS))])
    program = export_decoder(model, names="genai", cache=cache)
    decode = export_decoder(model, names="genai", cache=cache, one_token=True) if pair else None
    facts = {"context_length": 64, "pad": 0}
    for package in ("fxfuse", "genai"):
        write_package(tmp_path / package, program, decode=decode, package=package, model=facts)  # type: ignore[arg-type]
    room = 16 if cache == "static" else None
    columns, tokens = (goes_on(Session(tmp_path / name, max_length=room, threads=1)) for name in ("fxfuse", "genai"))
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)
    # The cause: a window that counts columns. The row without padding and the prompt alone are right with both.
    torch.testing.assert_close(columns[1], expected[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(columns[0, 0], expected[0, 0], rtol=1e-4, atol=1e-4)
    assert (columns[0] - expected[0]).abs().max() > 0.1


@pytest.mark.parametrize("cache", ["growing", pytest.param("static", marks=pytest.mark.slow)])
def test_padding_on_the_left_is_as_it_was(cache: Cache, tmp_path: Path) -> None:
    program = export_decoder(build("mistral"), names="genai", cache=cache)
    before = {value.name for node in program.graph for value in node.outputs}
    ir.save(with_token_windows(program), tmp_path / "tokens.onnx")
    assert {value.name for node in program.graph for value in node.outputs} == before, "the model itself stays"
    ir.save(program, tmp_path / "columns.onnx")
    room = 16 if cache == "static" else None
    sessions = [Session(tmp_path / f"{name}.onnx", max_length=room, threads=1) for name in ("columns", "tokens")]
    ids, mask = IDS.flip(-1), MASK.flip(-1)
    results = [[s.prefill(ids, mask, chunk=4), *(s.step(tokens) for tokens in NEXT.T)] for s in sessions]
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_what_has_no_window_is_left_alone() -> None:
    program = export_decoder(build("llama"), names="genai", cache="static", profile="cuda")
    assert with_token_windows(program) is program
