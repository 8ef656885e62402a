"""Rows of a batch that each stand at a length of their own, in one static cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fxfuse.decoder.export import export_decoder
from fxfuse.errors import FxfuseError
from tests.decoder.models import CONFIGS, Decoder, build, operators

PROMPTS = [[5, 9, 21], [7, 3, 44, 12, 60]]


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_rows_go_on_from_where_they_end(name: str, tmp_path: Path) -> None:
    model = build(name)
    program = export_decoder(model, cache="static", ragged=True)
    counted = operators(program)
    assert "Where" not in counted and "Slice" in counted and counted.count("TensorScatter") == 4
    assert [value.name for value in program.graph.inputs][:2] == ["input_ids", "position_ids"]
    decoder = Decoder(program, tmp_path, 12)
    decoder.start(2)
    session, ids = decoder.session, np.zeros((2, 5), np.int64)
    for row, prompt in enumerate(PROMPTS):
        ids[row, : len(prompt)] = prompt
    outputs = [value.name for value in session.get_outputs()]

    def call(tokens: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        feeds = {"input_ids": tokens, "position_ids": positions, **decoder.cache}
        results = dict(zip(outputs, session.run(outputs, feeds), strict=True))
        decoder.cache = {past: results[past.replace("past_key_values", "present")] for past in decoder.cache}
        return torch.from_numpy(results["logits"])

    texts = [list(prompt) for prompt in PROMPTS]
    logits = call(ids, np.tile(np.arange(5), (2, 1)))
    last = torch.stack([logits[row, len(text) - 1] for row, text in enumerate(texts)])
    for _ in range(5):
        for row, text in enumerate(texts):
            with torch.no_grad():
                expected = model(torch.tensor([text])).logits[0, -1]
            torch.testing.assert_close(last[row], expected, atol=2e-5, rtol=1e-4)
            text.append(int(last[row].argmax()))
        tokens = np.array([[text[-1]] for text in texts])
        last = call(tokens, np.array([[len(text) - 1] for text in texts]))[:, -1]


def test_a_window_is_seen() -> None:
    assert "gemma3" in CONFIGS
    with pytest.raises(FxfuseError, match="a window") as caught:
        export_decoder(build("gemma3"), cache="static", ragged=True)
    assert caught.value.where == "ragged"


def test_a_growing_cache_has_one_length() -> None:
    with pytest.raises(FxfuseError, match="one length"):
        export_decoder(build("llama"), ragged=True)
