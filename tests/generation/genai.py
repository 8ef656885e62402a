"""onnxruntime-genai as a reader of its documentation uses it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime_genai as og

from tests.generation import tiny


class GenAI:
    """A folder, loaded once."""

    def __init__(self, folder: Path) -> None:
        self.model = og.Model(str(folder))
        self.tokenizer = og.Tokenizer(self.model)

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """Greedy tokens; shorter prompts are padded on the right, as its own `encode_batch` does."""
        width = max(map(len, prompts))
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(batch_size=len(prompts), max_length=width + new)
        generator = og.Generator(self.model, parameters)
        padded = [prompt + [tiny.PAD] * (width - len(prompt)) for prompt in prompts]
        generator.append_tokens(np.array(padded, dtype=np.int32))
        for _ in range(new):
            generator.generate_next_token()
        return [generator.get_sequence(row).tolist()[width:] for row in range(len(prompts))]
