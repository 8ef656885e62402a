"""Layers with a window keep no more than it: prompts shorter and longer than the ring, and what comes after them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from fxfuse.decoder.export import export_decoder
from fxfuse.errors import FxfuseError
from tests.decoder import test_torchtune
from tests.decoder.models import PADDED, PROMPT, Decoder, build, expected, operators, positions

WINDOW = 4


@cache
def exported(name: str) -> tuple[Any, ir.Model]:
    model = test_torchtune.build("gemma2") if name == "gemma2" else build(name)
    return model, export_decoder(model, cache="sliding")


@cache
def step(name: str) -> ir.Model:
    return export_decoder(exported(name)[0], cache="sliding", one_token=True)


class Ring(Decoder):
    """The cache's layers are of the sizes that the graph says, or of `length`; whatever is in them is not seen.

    Single tokens are read by `one`, where there is one.
    """

    def __init__(self, program: ir.Model, folder: Path, length: int, one: ir.Model | None = None) -> None:
        super().__init__(program, folder, length)
        self.graphs = [self.session, self.session]
        if one is not None:
            ir.save(one, folder / "step.onnx")
            self.graphs[1] = ort.InferenceSession(folder / "step.onnx", providers=["CPUExecutionProvider"])

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.session = self.graphs[ids.shape[1] == 1]
        return super().__call__(ids, mask)

    def start(self, batch: int) -> None:
        super().start(batch)
        for value in self.session.get_inputs():
            if value.name in self.cache and isinstance(value.shape[2], int):
                self.cache[value.name] = self.cache[value.name][:, :, : value.shape[2]]


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
def test_prompts_of_every_length(length: int, tmp_path: Path) -> None:
    """Gemma 3, of which one layer is a ring and one is not, against itself without any cache."""
    model, program = exported("gemma3")
    ids = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    tokens, logits = expected(model, ids, mask, 2 * WINDOW)
    decoder = Ring(program, tmp_path, 24)
    for chunk in (None, 3):
        ours, values = decoder.greedy(ids, mask, 2 * WINDOW, chunk)
        torch.testing.assert_close(values, logits, atol=2e-5, rtol=1e-4)
        assert torch.equal(ours, tokens)
    assert decoder.cache["past_key_values.0.key"].shape[2] == WINDOW


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
@pytest.mark.parametrize("name", ["gemma3", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_steps_in_place_after_a_prompt(name: str, length: int, tmp_path: Path) -> None:
    """One graph reads the prompt, whole or in chunks, the other a token at a time, over the one that drops out."""
    model, program = exported(name)
    ids = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    reference = test_torchtune.expected if name == "gemma2" else expected
    tokens, logits = reference(model, ids, mask, 3 * WINDOW)
    decoder = Ring(program, tmp_path, 32, step(name))
    for chunk in (None, 3):
        ours, values = decoder.greedy(ids, mask, 3 * WINDOW, chunk)
        torch.testing.assert_close(values, logits, atol=2e-5, rtol=1e-4)
        assert torch.equal(ours, tokens)


def test_a_step_moves_no_ring() -> None:
    """It is read by its write alone, and what was written by the attention as it lies."""
    program = step("gemma3")
    for past in [value for value in program.graph.inputs if (value.name or "").startswith("past_key_values.0")]:
        (write,) = [use.node for use in past.uses() if use.node.op_type != "Shape"]
        assert write.op_type == "TensorScatter" and write.outputs[0].is_graph_output()
        assert [use.node.op_type for use in write.outputs[0].uses()] == ["Attention"]


@pytest.mark.parametrize("name", ["gemma3", "gemma2"])
def test_padding_and_both_libraries(name: str, tmp_path: Path) -> None:
    model, program = exported(name)
    reference = test_torchtune.expected if name == "gemma2" else expected
    tokens, logits = reference(model, PROMPT, PADDED, 7)
    ours, values = Ring(program, tmp_path, 16).greedy(PROMPT, PADDED, 7)
    torch.testing.assert_close(values, logits, atol=2e-5, rtol=1e-4)
    assert torch.equal(ours, tokens)
    modes = [n.attributes["mode"].as_string() for n in program.graph if n.op_type == "TensorScatter"]
    assert sorted(modes) == ["circular"] * 2 + ["linear"] * 2
    assert operators(program).count("Attention") == 2


@pytest.mark.parametrize("pair", [False, True])
def test_input_and_output_may_share_their_memory(pair: bool, tmp_path: Path) -> None:
    """As the metadata says: where the ring is read before it is written too, though it is one and the same buffer."""
    model, program = exported("gemma3")
    decoder = Ring(program, tmp_path, 16, step("gemma3") if pair else None)
    aliases = json.loads(program.metadata_props["fxfuse.state"])["aliases"]
    assert set(aliases.values()) == {f"past_key_values.{i}.{what}" for i in (0, 1) for what in ("key", "value")}
    ids, mask = PROMPT, torch.ones_like(PROMPT)
    tokens, _ = expected(model, ids, mask, 6)
    decoder.start(2)
    buffers = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in decoder.cache.items()}
    new = ids
    for count in range(6):
        session = decoder.graphs[new.shape[1] == 1]
        binding = session.io_binding()
        feeds = {"input_ids": new, "attention_mask": mask, "position_ids": positions(mask)[:, -new.shape[1] :]}
        for name, tensor in feeds.items():
            binding.bind_cpu_input(name, tensor.contiguous().numpy())
        for output, name in aliases.items():
            binding.bind_ortvalue_input(name, buffers[name])
            binding.bind_ortvalue_output(output, buffers[name])
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        new = torch.from_numpy(binding.get_outputs()[-1].numpy())[:, -1:].argmax(-1)
        assert torch.equal(new[:, 0], tokens[:, count])
        mask = torch.cat([mask, torch.ones_like(new)], 1)


def test_a_model_without_windows_is_refused() -> None:
    with pytest.raises(FxfuseError, match="no layer of the model has a sliding window"):
        export_decoder(build("llama"), cache="sliding")
