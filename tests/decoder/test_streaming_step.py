"""Sinks and a window, one token a call and in place, after a prompt of any length that the other graph read."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from fxfuse.decoder.export import export_decoder
from fxfuse.errors import FxfuseError
from tests.decoder.models import build, operators
from tests.decoder.test_streaming import SINKS, SIZE, WINDOW, Reader, expected, exported, squares, tokens


@cache
def step(name: str) -> ir.Model:
    return export_decoder(exported(name)[0], cache="streaming", one_token=True, sinks=SINKS, window=WINDOW)


@pytest.mark.parametrize("length", [1, SINKS, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE])
@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama3_2", "qwen3"))])
def test_steps_after_a_prompt(name: str, length: int, tmp_path: Path) -> None:
    """All that the reference gives for it; beyond what torchtune's table has places for (64) as well."""
    new = 64 if length == SIZE else 2 * SIZE
    ids = tokens(length + new)
    reader = Reader(exported(name)[1], tmp_path, 2, step(name))
    parts = [ids[:, :length], *ids[:, length:].split(1, 1)]
    ours = torch.cat([reader(part) for part in parts], 1)
    torch.testing.assert_close(ours, expected(name, ids), atol=1e-5, rtol=1e-5)


def test_from_the_first_token_on(tmp_path: Path) -> None:
    """Without any prompt's graph: what no token was written to is not seen."""
    ids = tokens(3 * SIZE)
    reader = Reader(step("llama"), tmp_path, 2)
    ours = torch.cat([reader(token) for token in ids.split(1, 1)], 1)
    torch.testing.assert_close(ours, expected("llama", ids), atol=1e-5, rtol=1e-5)


def test_the_graphs_take_turns(tmp_path: Path) -> None:
    """At any place of the ring, either reads on from where the other stopped."""
    ids = tokens(40)
    reader = Reader(exported("llama")[1], tmp_path, 2, step("llama"))
    parts = ids.split([1, 3, 1, 1, 9, 1, 2, 1, 1, 1, 15, 1, 1, 2], 1)
    ours = torch.cat([reader(part) for part in parts], 1)
    torch.testing.assert_close(ours, expected("llama", ids), atol=1e-5, rtol=1e-5)


def test_rows_of_different_lengths(tmp_path: Path) -> None:
    """One has sinks to fill still, one is full, one went round more than once."""
    ids, lengths, new = tokens(40, 3), (1, SIZE, 23), 12
    alone = [Reader(exported("llama")[1], tmp_path, 1) for _ in lengths]
    for row, (reader, length) in enumerate(zip(alone, lengths, strict=True)):
        reader(ids[row : row + 1, :length])
    together = Reader(step("llama"), tmp_path, 3)
    together.cache = {name: np.concatenate([reader.cache[name] for reader in alone]) for name in together.cache}
    together.read = np.array(lengths)[:, None]
    more = torch.stack([ids[row, length : length + new] for row, length in enumerate(lengths)])
    ours = torch.cat([together(token) for token in more.split(1, 1)], 1)
    reference = expected("llama", ids)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(ours[row], reference[row, length : length + new], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", pytest.param("llama3_2", marks=pytest.mark.slow)])
def test_nothing_is_moved(name: str) -> None:
    """The cache is read by its write alone, and what was written by the graph's output, a rotation or an attention."""
    program = step(name)
    counts = Counter(operators(program))
    assert (counts["TensorScatter"], counts["Attention"], counts["RotaryEmbedding"]) == (4, 2, 4)
    assert not {"Concat", "GatherND", "Cos", "Sin"} & set(counts)
    pasts = [value for value in program.graph.inputs if (value.name or "").startswith("past")]
    for past in pasts:
        (write,) = [use.node for use in past.uses() if use.node.op_type != "Shape"]
        assert write.op_type == "TensorScatter" and write.outputs[0].is_graph_output()
        readers = [use.node.op_type for use in write.outputs[0].uses()]
        assert readers == ["RotaryEmbedding" if ".key" in (past.name or "") else "Attention"]


def test_one_buffer_is_input_and_output(tmp_path: Path) -> None:
    """Of both graphs, in turns."""
    ids = tokens(40)
    reader = Reader(exported("llama")[1], tmp_path, 2, step("llama"))
    buffers = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in reader.cache.items()}
    parts, begin = [], 0
    for part in ids.split([11, *[1] * 12, 4, *[1] * 13], 1):
        session = reader.step if part.shape[1] == 1 else reader.session
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", part.contiguous().numpy())
        binding.bind_cpu_input("position_ids", np.tile(np.arange(begin, begin + part.shape[1]), (2, 1)))
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        parts.append(torch.from_numpy(binding.get_outputs()[-1].numpy()))
        begin += part.shape[1]
    torch.testing.assert_close(torch.cat(parts, 1), expected("llama", ids), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_without_sinks(tmp_path: Path) -> None:
    model, ids = exported("llama")[0], tokens(20)
    options = {"cache": "streaming", "sinks": 0, "window": SIZE}
    whole = Reader(export_decoder(model, **options), tmp_path, 2)(ids)
    reader = Reader(export_decoder(model, **options, one_token=True), tmp_path, 2)
    ours = torch.cat([reader(token) for token in ids.split(1, 1)], 1)
    torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_rotation_that_tells_more_than_distances_is_refused() -> None:
    with pytest.raises(FxfuseError, match="tells more than distances: two places at one distance"):
        export_decoder(squares(), cache="streaming", one_token=True, window=64)


@pytest.mark.slow
def test_a_window_of_the_models_own_is_refused() -> None:
    with pytest.raises(FxfuseError, match=r"other keys are hidden \(a window\?\)"):
        export_decoder(build("gemma3"), cache="streaming", one_token=True, window=64)
